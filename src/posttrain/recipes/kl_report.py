"""What a recipe without a sampling loop says of the KL that it has spent: measured once, when training is over.

The prompts are those of the run's own examples, as tokens; the reference is where the policy began: its base without
the adapters, or the folder it was loaded from, loaded again. `kl_spent.json` in the run's folder holds what
reinforcement learning has in its metrics, under the same names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from posttrain.core import Example, RolloutError, Task, content_hash
from posttrain.recipes.kl_spent import fixed_prompts, kl_spent_sync
from posttrain.recipes.policy import Policy, load_policy
from posttrain.recipes.workbench import Workbench
from posttrain.registry.durable import write_atomic

MAX_TOKENS = 64  # of an answer, where the recipe itself samples none
FILE = "kl_spent.json"


def prompts_of(examples: Iterable[Example]) -> dict[str, tuple[int, ...]]:
    """The examples' prompts, each once, by hash: what stands before the first target of the last sequence.

    (Of a pair that is the rejected answer: only its targets are the answer alone with every method.)
    """
    found = set()
    for example in examples:
        sequence = example.sequences[-1]
        if any(sequence.mask) and (prompt := sequence.tokens[: sequence.mask.index(True)]):
            found.add(prompt)
    return {content_hash(list(prompt)): prompt for prompt in found}


def report_kl(
    bench: Workbench,
    policy: Policy,
    prompts: Sequence[Task] | Sequence[Example],
    *,
    num_prompts: int,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
) -> dict[str, float]:
    """Measure the KL of a tuned policy to its start, say it, and keep it; call it before the policy is saved.

    Args:
        bench: the run; a measurement that it has already is not repeated.
        policy: tuned, as it was loaded and given its adapters.
        prompts: tasks, or examples whose prompts are taken; of these always the same `num_prompts`.
        num_prompts: 0 measures nothing.
        max_tokens: new tokens per answer, or as many as the model has positions for; four answers per prompt. Prompts
            that leave no room for them, nor half of the positions, are left out.
        seed: of the answers.

    Returns:
        `kl_spent/…`, see `kl_spent.KlSpent`; empty where nothing was measured: what it cannot measure is said, and a
        model that is trained is not lost for it.
    """
    path = bench.run.path / FILE
    if path.is_file():
        known: dict[str, float] = json.loads(path.read_bytes())
        return known
    tasks = [one for one in prompts if isinstance(one, Task)]
    given = prompts_of(one for one in prompts if isinstance(one, Example))
    tasks += [Task(id=key, prompt=policy.tokenizer.decode(prompt)) for key, prompt in given.items()]
    chosen = fixed_prompts(tasks, num_prompts)
    tokens = {task.id: given.get(task.id) or tuple(policy.renderer.prompt(task)) for task in chosen}
    positions = policy.model.config.max_positions
    chosen = [task for task in chosen if positions - len(tokens[task.id]) >= min(max_tokens, positions // 2)]
    if not chosen:
        return {}
    max_tokens = min(max_tokens, positions - max(len(tokens[task.id]) for task in chosen))
    reference = None
    if not policy.fresh_adapters:
        adapter = policy.path if policy.base is not None and policy.base != policy.path else None
        device = str(policy.model.embed.weight.device)
        reference = load_policy(str(policy.base or policy.path), device=device, adapter=adapter).model
    try:
        spent = kl_spent_sync(
            policy, reference, chosen, max_tokens=max_tokens, seed=seed, prompt_tokens=lambda task: tokens[task.id]
        )
    except RolloutError as error:
        bench.say(f"the KL to the start could not be measured: {error}")
        return {}
    metrics = spent.metrics()
    write_atomic(path, json.dumps(metrics, indent=1).encode() + b"\n")
    bench.say(
        f"KL to the start, nats per answer: {spent.per_answer:.3f} ± {spent.per_answer_error:.3f} (standard error), "
        f"{spent.num_prompts} prompts, up to {max_tokens} tokens"
    )
    return metrics
