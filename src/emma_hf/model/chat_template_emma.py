"""The `vicuna_v1` conversation of LLaVA-1.5, as a system prompt and a chat template."""

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


__all__ = ["CHAT_TEMPLATE", "SYSTEM_PROMPT"]
