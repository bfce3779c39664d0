"""Clients of OpenAI's protocol in Python: `clients.py CLIENT ADDRESS CASES`, without the package and without torch.

CASES is a JSON file, a list of `{"model", "messages", "stream", "options"}`, of which the messages have OpenAI's form.
Printed is a list with `{"text"}` of each answer, or `{"error", "text"}` with the class and the text of the exception.
"""

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

KEY = "none"


def text_of(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def images_of(message: dict) -> list[tuple[str, bytes]]:
    """Media type and bytes of each image of a message."""
    parts = message["content"] if isinstance(message["content"], list) else []
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    split = [url.removeprefix("data:").split(";base64,") for url in urls]
    return [(media_type, base64.b64decode(encoded)) for media_type, encoded in split]


def openai_python(address: str) -> Callable[..., str]:
    import openai

    client = openai.OpenAI(base_url=address, api_key=KEY, max_retries=0)

    def ask(model: str, messages: list[dict], stream: bool, options: dict) -> str:
        asked = {"model": model, "messages": messages, **options}
        if not stream:
            return client.chat.completions.create(**asked).choices[0].message.content
        with client.chat.completions.stream(**asked) as events:
            return events.get_final_completion().choices[0].message.content

    return ask


def litellm(address: str) -> Callable[..., str]:
    import litellm

    litellm.suppress_debug_info = True

    def ask(model: str, messages: list[dict], stream: bool, options: dict) -> str:
        answer = litellm.completion(
            f"openai/{model}", messages, api_base=address, api_key=KEY, num_retries=0, max_retries=0, stream=stream,
            **options,
        )  # fmt: skip
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        return answer.choices[0].message.content

    return ask


def langchain(address: str) -> Callable[..., str]:
    from langchain_openai import ChatOpenAI

    def ask(model: str, messages: list[dict], stream: bool, options: dict) -> str:
        chat = ChatOpenAI(model=model, base_url=address, api_key=KEY, max_retries=0, **options)
        if stream:
            return "".join(chunk.text for chunk in chat.stream(messages))
        return chat.invoke(messages).text

    return ask


def llama_index(address: str) -> Callable[..., str]:
    from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
    from llama_index.llms.openai_like import OpenAILike

    def ask(model: str, messages: list[dict], stream: bool, options: dict) -> str:
        options = dict(options)
        client = OpenAILike(
            model=model, api_base=address, api_key=KEY, is_chat_model=True, max_retries=0,
            # Its own temperature, 0.1, would sample.
            temperature=0, max_tokens=options.pop("max_tokens"), additional_kwargs=options,
        )  # fmt: skip
        converted = [
            ChatMessage(
                role=message["role"],
                blocks=[
                    *(ImageBlock(image=data, image_mimetype=media_type) for media_type, data in images_of(message)),
                    TextBlock(text=text_of(message)),
                ],
            )
            for message in messages
        ]
        if stream:
            return "".join(piece.delta or "" for piece in client.stream_chat(converted))
        return client.chat(converted).message.content

    return ask


def pydantic_ai(address: str) -> Callable[..., str]:
    from pydantic_ai import Agent, BinaryContent
    from pydantic_ai.messages import ModelRequest, ModelResponse, TextPart, UserPromptPart
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider
    from pydantic_ai.settings import ModelSettings

    provider = OpenAIProvider(base_url=address, api_key=KEY)

    def prompt(message: dict) -> list[Any]:
        images = [BinaryContent(data=data, media_type=media_type) for media_type, data in images_of(message)]
        return [*images, text_of(message)]

    def ask(model: str, messages: list[dict], stream: bool, options: dict) -> str:
        system = [message["content"] for message in messages if message["role"] == "system"]
        agent = Agent(OpenAIChatModel(model, provider=provider), instructions=system, retries=0)
        *before, last = [message for message in messages if message["role"] != "system"]
        history = [
            ModelRequest(parts=[UserPromptPart(content=prompt(message))])
            if message["role"] == "user"
            else ModelResponse(parts=[TextPart(content=message["content"])])
            for message in before
        ]
        settings = {"message_history": history, "model_settings": ModelSettings(**options)}
        if stream:
            return agent.run_stream_sync(prompt(last), **settings).get_output()
        return agent.run_sync(prompt(last), **settings).output

    return ask


CLIENTS = {
    "openai-python": openai_python,
    "litellm": litellm,
    "langchain": langchain,
    "llama-index": llama_index,
    "pydantic-ai": pydantic_ai,
}


def main(name: str, address: str, path: str) -> None:
    ask = CLIENTS[name](address)
    results = []
    for case in json.loads(Path(path).read_text(encoding="utf-8")):
        try:
            results.append({"text": ask(**case)})
        except Exception as error:
            kind = type(error)
            results.append({"error": f"{kind.__module__.split('.')[0]}.{kind.__name__}", "text": str(error)})
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
