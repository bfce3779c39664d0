"""The `vicuna_v1` conversation of LLaVA-1.5, as a system prompt and a chat template."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .errors_emma import EmmaError

# What a conversation without a system turn begins with; a space follows it.
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# The `vicuna_v1` conversation (LLaVA-1.5): a turn's images first, each followed by a line break, then its words.
CHAT_TEMPLATE = """\
{%- macro words(content) -%}
    {%- if content is string -%}{{ content }}
    {%- else -%}
        {%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}
    {{- words(messages[0]['content']) + ' ' -}}
{%- else -%}
    {{- "SYSTEM_PROMPT " -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' -}}
        {%- if message['content'] is not string -%}
            {%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
        {%- endif -%}
        {{- words(message['content']) + ' ' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}{{- ' ' + words(message['content']) + eos_token -}}{%- endgeneration -%}
    {%- elif not (message['role'] == 'system' and loop.first) -%}
        {{- raise_exception("Roles are system (first only), user and assistant: got " + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
""".replace("SYSTEM_PROMPT", SYSTEM_PROMPT)

# What a message can hold beside its role and its content, and a conversation beside its messages.
_MESSAGE_KEYS = ("audio", "audios", "function_call", "image", "images", "tool_calls", "video", "videos")
_KEYWORDS = ("documents", "tools")


def refuse_unread(template: str | None, messages: Iterable[Mapping[str, Any]], keywords: Mapping[str, Any]) -> None:
    """Raise an EmmaError for what is given to a template that does not read it; it would vanish without a word."""
    given = [(message, name, rf"(?:\.|[\[(]['\"]){name}\b") for message in messages for name in _MESSAGE_KEYS]
    for values, name, reads in given + [(keywords, name, rf"\b{name}\b") for name in _KEYWORDS]:
        value = values.get(name)
        is_empty = value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value)
        if not is_empty and not re.search(reads, template or ""):
            raise EmmaError(
                f"The chat template reads the role and the content of messages: got `{name}` {str(value)[:100]!a}. Put "
                "images into the content, as parts, and leave out what the model cannot use."
            )


__all__ = ["CHAT_TEMPLATE", "SYSTEM_PROMPT", "refuse_unread"]
