"""EMMA as vLLM runs it: vLLM's own wrapper of Transformers models, whose processor has read the prompt."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersMultiModalForCausalLM,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .vllm_plugin import only_missing, with_instructions


class EmmaMultiModalProcessor(MultiModalProcessor):
    """Makes the instructions part of what pictures are processed with, and so of the key of every cache."""

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        images = inputs.mm_data_items.get_all_counts().get("image", 0)
        options = with_instructions(inputs.hf_processor_mm_kwargs, inputs.prompt, images, self.info.get_hf_processor())
        return super().apply(replace(inputs, hf_processor_mm_kwargs=options), *args, **kwargs)

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Mapping[str, object]:
        options = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)
        return only_missing(options, mm_is_cached["image"]) if "image" in mm_is_cached else options


@MULTIMODAL_REGISTRY.register_processor(
    EmmaMultiModalProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class EmmaForVllm(TransformersMultiModalForCausalLM):
    """The architecture `EmmaForConditionalGeneration` of a config."""
