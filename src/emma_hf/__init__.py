"""EMMA (Efficient Multi-Modal Adaptation, arXiv 2410.02080) for Transformers 4.57 and 5."""

from pathlib import Path

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

# From its own module: before Transformers 5.20, `transformers` has a placeholder of that name without torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .model.configuration_emma import EmmaConfig
from .model.errors_emma import EmmaError, HubError
from .model.image_processing_emma import EmmaImageProcessor
from .model.modeling_emma import EmmaForConditionalGeneration, EmmaModel, EmmaPreTrainedModel
from .model.processing_emma import EmmaProcessor

try:
    from transformers import AutoModelForVision2Seq
except ImportError:
    # Gone in Transformers 5, where its successor does the same.
    AutoModelForVision2Seq = AutoModelForImageTextToText

__version__ = "0.1.0"
# Folder of the trained model that ships with the package: it answers questions about the pictures of `emma_hf.tiny`.
EMMA_TINY = Path(__file__).parent / "tiny" / "emma-tiny"

AutoConfig.register(EmmaConfig.model_type, EmmaConfig)
AutoModel.register(EmmaConfig, EmmaModel)
# Not every supported version has each of them.
for _name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForVision2Seq"):
    if hasattr(transformers, _name):
        getattr(transformers, _name).register(EmmaConfig, EmmaForConditionalGeneration)
AutoProcessor.register(EmmaConfig, EmmaProcessor)
AutoImageProcessor.register(EmmaConfig, slow_image_processor_class=EmmaImageProcessor)

__all__ = [
    "EMMA_TINY",
    "AutoModelForVision2Seq",
    "EmmaConfig",
    "EmmaError",
    "EmmaForConditionalGeneration",
    "EmmaImageProcessor",
    "EmmaModel",
    "EmmaPreTrainedModel",
    "EmmaProcessor",
    "HubError",
]
