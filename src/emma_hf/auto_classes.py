"""The public classes, registered with Transformers' Auto classes on import."""

from typing import Any, NoReturn

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

# From its own module: before Transformers 5.20, `transformers` has a placeholder of that name without torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from .model.compat_emma import image_text_auto_classes
from .model.configuration_emma import EmmaConfig
from .model.errors_emma import EmmaError, HubError
from .model.image_processing_emma import EmmaImageProcessor
from .model.modeling_emma import EmmaForConditionalGeneration, EmmaModel, EmmaPreTrainedModel
from .model.processing_emma import EmmaProcessor

# Gone in Transformers 5, where its successor does the same.
AutoModelForVision2Seq = image_text_auto_classes().get("AutoModelForVision2Seq", AutoModelForImageTextToText)


class _NoVideoProcessor:
    """Registered for pipelines of Transformers 5: they look for a video processor of any model, infer from a folder's
    `auto_map` that its code has one, and would ask the user whether to run that code.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise EmmaError("EMMA reads text and images and has no video processor. Pass frames of a video as `images`.")


AutoConfig.register(EmmaConfig.model_type, EmmaConfig)
AutoModel.register(EmmaConfig, EmmaModel)
for _auto_class in image_text_auto_classes().values():
    _auto_class.register(EmmaConfig, EmmaForConditionalGeneration)
AutoProcessor.register(EmmaConfig, EmmaProcessor)
AutoImageProcessor.register(EmmaConfig, slow_image_processor_class=EmmaImageProcessor)
AutoVideoProcessor.register(EmmaConfig, _NoVideoProcessor)

__all__ = [
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
