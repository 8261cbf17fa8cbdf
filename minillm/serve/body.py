"""From the JSON of OpenAI's API to prompts and sampling parameters. What cannot be done is refused by name.

The file knows no HTTP and no engine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from minillm.model.sampling import SamplingParams
from minillm.model.tokenizer import Tokenizer

_NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields that this server leaves out, and the values that ask for nothing
    "logprobs": (None, False, 0), "top_logprobs": (None, 0), "echo": (None, False), "suffix": (None, ""), "best_of": (None, 1),
    "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "logit_bias": (None, {}), "tools": (None, []),
    "functions": (None, []), "response_format": (None, {"type": "text"}), "audio": (None,), "tool_choice": (None, "none", "auto"),
    "min_p": (None, 0), "min_tokens": (None, 0), "repetition_penalty": (None, 1),
}  # fmt: skip
_KNOWN = {
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_k", "top_p", "n", "seed", "stop",
    "stop_token_ids", "ignore_eos", "stream", "stream_options",
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",  # say nothing
}  # fmt: skip
_MOST_STOPS, _LONGEST_STOP = 16, 1000


@dataclass(frozen=True)
class Call:
    """What a client asked for: prompts (texts or token ids), how to continue them, and how to answer."""

    prompts: list[Any]
    params: SamplingParams
    chat: bool
    stream: bool
    usage: bool  # whether a stream ends with the counts


def parse_json(raw: bytes) -> dict[str, Any]:
    """The body as an object. Raises `ValueError`."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise ValueError(f"the body is not JSON: {reason}") from None
    if not isinstance(body, dict):
        raise ValueError(f"the body is a JSON {type(body).__name__}; send an object")
    return body


def parse_completion(body: dict[str, Any]) -> Call:
    """The body of /v1/completions. Raises `ValueError` that names the field."""
    prompt = body.get("prompt")
    if isinstance(prompt, str) or _are(prompt, int):
        prompts: list[Any] = [prompt]
    elif isinstance(prompt, list) and prompt and (_are(prompt, str) or all(_are(each, int) for each in prompt)):
        prompts = prompt
    else:
        raise ValueError("prompt: give a text, a list of token ids, or a list of either")
    return Call(prompts, _params(body, 16), False, *_streaming(body))


def parse_chat(body: dict[str, Any], tokenizer: Tokenizer, room: int) -> Call:
    """The body of /v1/chat/completions; without a limit an answer may take all of `room` tokens that the prompt leaves."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError('messages: give a list such as [{"role": "user", "content": "…"}]')
    prompt = tokenizer.chat([_message(each, number) for number, each in enumerate(messages)])
    limit = body.get("max_completion_tokens")
    body = {**body, "max_tokens": body.get("max_tokens") if limit is None else limit}
    left = max(1, room - len(prompt))
    return Call([prompt], _params(body, left), True, *_streaming(body))


def _message(message: Any, number: int) -> dict[str, str]:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise ValueError(f'messages: message {number} must be {{"role": "…", "content": "…"}} with texts')
    return {"role": message["role"], "content": content}


def _params(body: dict[str, Any], max_tokens: int) -> SamplingParams:
    for name, neutral in _NEUTRAL.items():
        if body.get(name) not in neutral:
            raise ValueError(f"{name}: this server does not know it; leave it out")
    unknown = sorted(body.keys() - _KNOWN - _NEUTRAL.keys())
    if unknown:
        raise ValueError(f"{unknown[0]}: this server does not know it; leave it out")
    stop = body.get("stop")
    if stop is not None and not isinstance(stop, str) and not (isinstance(stop, list) and all(isinstance(s, str) for s in stop)):  # fmt: skip
        raise ValueError("stop: give a text or a list of texts")
    texts = [stop] if isinstance(stop, str) else stop or []
    if len(texts) > _MOST_STOPS or any(len(text) > _LONGEST_STOP for text in texts):
        raise ValueError(f"stop: give at most {_MOST_STOPS} texts of at most {_LONGEST_STOP:,} characters")
    ids = body.get("stop_token_ids")
    if ids is not None and ids != [] and not _are(ids, int):
        raise ValueError("stop_token_ids: give a list of token ids")
    ignore_eos = body.get("ignore_eos", False)
    if not isinstance(ignore_eos, bool):
        raise ValueError("ignore_eos: give true or false")

    def or_default(name: str, default: Any) -> Any:
        return default if body.get(name) is None else body[name]

    return SamplingParams(
        max_tokens=or_default("max_tokens", max_tokens),
        temperature=or_default("temperature", 1.0),
        top_k=or_default("top_k", 0),
        top_p=or_default("top_p", 1.0),
        seed=body.get("seed"),
        stop=stop or (),
        stop_token_ids=ids or (),
        ignore_eos=ignore_eos,
        n=or_default("n", 1),
    )


def _streaming(body: dict[str, Any]) -> tuple[bool, bool]:
    stream, options = body.get("stream") or False, body.get("stream_options") or {}
    if not isinstance(stream, bool) or not isinstance(options, dict):
        raise ValueError("stream: give true or false, and stream_options as an object")
    return stream, options.get("include_usage") is True


def _are(values: Any, kind: type) -> bool:
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
    )
