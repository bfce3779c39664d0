"""EMMA as vLLM runs it: vLLM's own wrapper of Transformers models, whose processor has read the prompt."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
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

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        hf_data, hf_kwargs, passthrough = self._get_hf_mm_inputs(mm_items, hf_kwargs)
        if not hf_data:
            return self._finalize_hf_mm_data(hf_data, hf_kwargs, passthrough)
        processor = self.info.get_hf_processor(**hf_kwargs)
        outputs = self.info.ctx.call_hf_processor(processor, hf_data, hf_kwargs)
        # The words were vLLM's own, to go with the pictures.
        outputs.pop("input_ids")
        # vLLM asks processors what each placeholder became; EMMA's is always as many of itself.
        images = len(outputs["pixel_values"])
        outputs["image_replacement_ids"] = torch.full((images * processor.image_seq_length,), processor.image_token_id)
        outputs["image_replacement_sizes"] = torch.full((images,), processor.image_seq_length)
        outputs["num_image_patches"] = torch.ones(images, dtype=torch.long)
        return self._finalize_hf_mm_data(hf_data, hf_kwargs, passthrough, outputs)

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Mapping[str, object]:
        options = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)
        return only_missing(options, mm_is_cached["image"]) if "image" in mm_is_cached else options


@MULTIMODAL_REGISTRY.register_processor(
    EmmaMultiModalProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class EmmaForVllm(TransformersMultiModalForCausalLM):
    """The architecture `EmmaForConditionalGeneration` of a config."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # vLLM's linear layers on a CPU take no views; the visual tokens come transposed.
        self.model.multi_modal_projector.linear_1.register_forward_pre_hook(
            lambda module, inputs: (inputs[0].contiguous(),)
        )

    def _create_hf_to_vllm_mapper(self) -> None:
        # vLLM wraps `EmmaModel`, which passes over the head of a checkpoint; here the head is wanted.
        self.model._keys_to_ignore_on_load_unexpected = None
        super()._create_hf_to_vllm_mapper()
