"""The tokenizer: text ↔ token ids, read from and written to Hugging Face folders.

A thin hull around the `tokenizers` library. It adds what a folder says besides `tokenizer.json`: the special tokens'
names, which ids end a sequence (tokenizer, config.json and generation_config.json each have a say), the chat templates.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from posttrain.core import RenderError
from posttrain.render.bpe import train_byte_level_bpe
from posttrain.render.chatml import CHATML

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to ids and back. Satisfies `posttrain.core.TextTokenizer`.

    `encode` recognises special tokens written in the text. Nothing is ever truncated or padded.
    """

    def __init__(
        self,
        definition: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        eos_ids: Iterable[int] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Build from the content of a tokenizer.json.

        Args:
            definition: the text of a tokenizer.json.
            special_tokens: name ("bos_token", "eos_token" …) → the token's text. One that the vocabulary lacks is added
                at its end, as Hugging Face does.
            chat_templates: name → Jinja text; "default" is the one that is used, "tool_use" when there are tools.
            eos_ids: ids that end a sequence besides the eos token.
            config: the parsed tokenizer_config.json; kept for `save`, and read for add_bos_token and add_eos_token.

        Raises:
            RenderError: the definition is not one that `tokenizers` reads.
        """
        self._config = dict(config or {})
        self.special_tokens: dict[str, str] = dict(special_tokens or {})
        self.chat_templates: dict[str, str] = dict(chat_templates or {})
        self._backend = _backend(definition, self.special_tokens, self._config)
        self._prefix, self._suffix = self._affixes()
        # Without its post-processor the backend adds no special tokens and, unlike ByteLevel's `trim_offsets`, leaves
        # the offsets as they are: every character belongs to the token that holds it.
        self._post_processor, self._backend.post_processor = self._backend.post_processor, None
        self._extra_eos = frozenset(eos_ids)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self._size = 1 + max(vocabulary.values(), default=-1)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read a Hugging Face folder: tokenizer.json (or .json.gz) and, where present, tokenizer_config.json,
        special_tokens_map.json, chat_template.jinja, additional_chat_templates/, config.json, generation_config.json.

        Raises:
            RenderError: there is no tokenizer.json, or a file cannot be read.
        """
        folder = Path(path)
        definition = _read_text(folder / "tokenizer.json") or _read_text(folder / "tokenizer.json.gz")
        if not definition:
            raise RenderError(
                f"{folder}: no tokenizer.json here; a tokenizer folder as Hugging Face saves it is needed"
            )
        config = _read_json(folder / "tokenizer_config.json") or {}
        named = {**(_read_json(folder / "special_tokens_map.json") or {}), **config}
        special = {name: text for name in NAMED_TOKENS if (text := _token_text(named.get(name))) is not None}
        templates = _templates_of(folder, config)
        tokenizer = cls(definition, special_tokens=special, chat_templates=templates, config=config)
        tokenizer._extra_eos = _eos_ids_of(folder)
        return tokenizer

    @classmethod
    def train_bpe(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        chat_template: str | None = CHATML,
        *,
        eos_token: str | None = None,
        pad_token: str | None = None,
    ) -> Tokenizer:
        """A byte-level BPE tokenizer made from nothing. The same texts give the same tokenizer on every machine.

        Args:
            texts: what to learn merges from.
            vocab_size: how many ids at most, the special tokens and the 256 bytes among them.
            special_tokens: control tokens; they take the first ids.
            chat_template: Jinja text, or None. The built-in one is left out where its tokens are not special.
            eos_token: which of them ends a sequence; default "<|im_end|>" if it is one, else the first.
            pad_token: default the first.

        Raises:
            RenderError: vocab_size has no room for the special tokens and the bytes, or eos_token is not special.
        """
        definition = train_byte_level_bpe(texts, vocab_size, special_tokens)
        special = {"eos_token": eos_token or ("<|im_end|>" if "<|im_end|>" in special_tokens else special_tokens[0])}
        special["pad_token"] = pad_token or special_tokens[0]
        for name, text in special.items():
            if text not in special_tokens:
                raise RenderError(f"{name} {text!r} is not among the special tokens {list(special_tokens)}")
        if chat_template is CHATML and not {"<|im_start|>", "<|im_end|>"} <= set(special_tokens):
            chat_template = None
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
        templates = {} if chat_template is None else {"default": chat_template}
        extra = [special_tokens.index(text) for text in ("<|endoftext|>",) if text in special_tokens]
        return cls(definition, special_tokens=special, chat_templates=templates, eos_ids=extra, config=config)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat templates.

        Ids that end a sequence besides the eos token go to generation_config.json, if the folder has none yet.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / "tokenizer.json").write_text(self._definition(), encoding="utf-8")
        config = {key: value for key, value in self._config.items() if key != "chat_template"}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        _write_json(target / "tokenizer_config.json", {**config, **self.special_tokens})
        _write_json(target / "special_tokens_map.json", self.special_tokens)
        for name, template in self.chat_templates.items():
            file = target / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
            file.parent.mkdir(exist_ok=True)
            file.write_text(template, encoding="utf-8")
        generation = target / "generation_config.json"
        if self._extra_eos - {self.eos_id} and not generation.exists():
            _write_json(generation, {"eos_token_id": sorted(self.eos_ids)})

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._size

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a sequence, by the tokenizer, config.json or generation_config.json."""
        return self._extra_eos if self.eos_id is None else self._extra_eos | {self.eos_id}

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a sequence, if there is one."""
        return self._named_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """Id of the tokenizer's own end-of-sequence token, if there is one."""
        return self._named_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token, if there is one."""
        return self._named_id("pad_token")

    @property
    def chat_template(self) -> str | None:
        """The default chat template's text."""
        return self.chat_templates.get("default")

    @property
    def added_tokens(self) -> dict[str, int]:
        """Tokens that are matched whole in a text before it is split: text → id. Special tokens are among them."""
        return {token.content: number for number, token in self._backend.get_added_tokens_decoder().items()}

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out by default."""
        return frozenset(number for number, token in self._backend.get_added_tokens_decoder().items() if token.special)

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids that `encode(…, add_special_tokens=True)` puts before a text: usually the bos token or nothing."""
        return self._prefix

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; special tokens written in it become their ids.
            add_special_tokens: also put what the tokenizer puts around a sequence (usually bos).

        Raises:
            RenderError: the text holds half a surrogate pair, which UTF-8 cannot hold.
        """
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        batch = [encoding.ids for encoding in self._encodings(texts)]
        if add_special_tokens:
            return [[*self._prefix, *ids, *self._suffix] for ids in batch]
        return batch

    def offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, and for each the characters (start, end) of the text that it holds.

        Tokens that share one character (bytes of an emoji) have the same offsets.
        """
        return self.offsets_batch([text])[0]

    def offsets_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """`offsets` of many texts, in parallel."""
        return [(encoding.ids, encoding.offsets) for encoding in self._encodings(texts)]

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids. Bytes that are no UTF-8 become U+FFFD; ids beyond the vocabulary are left out."""
        text: str = self._backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it (byte-level: "Ġthe"), or None."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def id(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it, or None."""
        number: int | None = self._backend.token_to_id(token)
        return number

    def _encodings(self, texts: Sequence[str]) -> list[Any]:
        try:
            encodings: list[Any] = self._backend.encode_batch(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            for text in texts:
                if any("\ud800" <= character <= "\udfff" for character in text):
                    raise RenderError(f"half a surrogate pair is no character: {text[:60]!r}") from error
            raise
        return encodings

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.id(text)

    def _definition(self) -> str:
        whole = tokenizers.Tokenizer.from_str(self._backend.to_str())
        whole.post_processor = self._post_processor
        text: str = whole.to_str(pretty=True)
        return text

    def _affixes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What goes before and after a sequence. The config's word, if it says one, outweighs the post-processor."""
        if "add_bos_token" in self._config or "add_eos_token" in self._config:
            bos = self.bos_id if self._config.get("add_bos_token") else None
            eos = self.eos_id if self._config.get("add_eos_token") else None
            return (() if bos is None else (bos,)), (() if eos is None else (eos,))
        plain = self._backend.encode("a", add_special_tokens=False).ids
        whole = self._backend.encode("a", add_special_tokens=True).ids
        start = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
        return tuple(whole[:start]), tuple(whole[start + len(plain) :])


def _backend(definition: str, special: Mapping[str, str], config: Mapping[str, Any]) -> Any:
    try:
        backend = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises bare Exception
        raise RenderError(f"tokenizer.json cannot be read by the tokenizers library: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    declared = config.get("added_tokens_decoder") or {}
    for number in sorted(declared, key=int):
        fields = {key: declared[number][key] for key in declared[number] if key not in ("content", "__type")}
        if backend.token_to_id(declared[number]["content"]) is None:
            backend.add_tokens([tokenizers.AddedToken(declared[number]["content"], **fields)])
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = [text for text in dict.fromkeys(special.values()) if text not in known]
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in missing])
    return backend


def _read_text(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise RenderError(f"{path}: cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    text = _read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RenderError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RenderError(f"{path}: a JSON object is needed, not a {type(value).__name__}")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _templates_of(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name; files win over the config, as they do in transformers."""
    found: dict[str, str] = {}
    in_config = config.get("chat_template")
    if isinstance(in_config, str):
        found["default"] = in_config
    elif isinstance(in_config, list):
        found.update({entry["name"]: entry["template"] for entry in in_config})
    elif isinstance(in_config, dict):
        found.update(in_config)
    if (folder / "chat_template.jinja").exists():
        found["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    legacy = _read_json(folder / "chat_template.json") or {}
    if "default" not in found and isinstance(legacy.get("chat_template"), str):
        found["default"] = legacy["chat_template"]
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = file.read_text(encoding="utf-8")
    return found


def _eos_ids_of(folder: Path) -> frozenset[int]:
    ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        content = _read_json(folder / name) or {}
        for part in (content, content.get("text_config") or {}):
            value = part.get("eos_token_id")
            ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)
