"""models: folder ↔ weights, and the decoder between tokens and logits.

Takes Hugging Face folders, gives a `Decoder`; takes hidden states, gives logprobs. One native decoder serves trainer
and sampler; `Attend` is the seam where a sampler's cache or a trainer's packing goes in. May import: core, torch.
"""

from posttrain.models.adapter_folder import base_of, is_adapter_folder, load_adapters, save_adapters
from posttrain.models.adapters import (
    PlainWeights,
    adapter_config,
    add_adapters,
    has_adapters,
    merge_adapters,
    merged_adapters,
)
from posttrain.models.attend import Attend, CausalAttend, causal_attention, packed_positions
from posttrain.models.config import DecoderConfig, RopeScaling
from posttrain.models.decoder import Decoder, flops_per_token, num_parameters
from posttrain.models.folder import load, save, to_hf_tensors
from posttrain.models.frozen import freeze_layers
from posttrain.models.fused_decoder import packed_states, shares_prefixes
from posttrain.models.fused_prefix import SharedRow, share
from posttrain.models.heads import ScoredDecoder
from posttrain.models.heads_folder import load_scored, save_scored
from posttrain.models.hub import resolve
from posttrain.models.lora import LoraConfig, adapters_off
from posttrain.models.merging import Merge, merge_tensors
from posttrain.models.merging_folders import merge_folders
from posttrain.models.native import load_native
from posttrain.models.products import quickest_dtype
from posttrain.models.quantised import quantise
from posttrain.models.token_divergence import TokenDivergence, chosen_logprobs, token_divergence
from posttrain.models.token_stats import TokenStats, token_stats
from posttrain.models.weights import weight_table

__all__ = [
    "Attend",
    "CausalAttend",
    "Decoder",
    "DecoderConfig",
    "LoraConfig",
    "Merge",
    "PlainWeights",
    "RopeScaling",
    "ScoredDecoder",
    "SharedRow",
    "TokenDivergence",
    "TokenStats",
    "adapter_config",
    "adapters_off",
    "add_adapters",
    "base_of",
    "causal_attention",
    "chosen_logprobs",
    "flops_per_token",
    "freeze_layers",
    "has_adapters",
    "is_adapter_folder",
    "load",
    "load_adapters",
    "load_native",
    "load_scored",
    "merge_adapters",
    "merge_folders",
    "merge_tensors",
    "merged_adapters",
    "num_parameters",
    "packed_positions",
    "packed_states",
    "quantise",
    "quickest_dtype",
    "resolve",
    "save",
    "save_adapters",
    "save_scored",
    "share",
    "shares_prefixes",
    "to_hf_tensors",
    "token_divergence",
    "token_stats",
    "weight_table",
]
