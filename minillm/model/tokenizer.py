"""Text to token ids and back, and the checkpoint's chat template. A thin layer over the `tokenizers` library."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from minillm.model.config_json import read_json


class Tokenizer:
    """A checkpoint's tokenizer.json and chat template. Raises `ValueError` when the folder has none, or a broken one."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ValueError(f"{folder} has no tokenizer.json; download the whole checkpoint")
        try:
            self.fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path} cannot be read ({error}); download the checkpoint again") from None
        self.fast.no_truncation()  # what training stored is no business of a prompt
        self.fast.no_padding()
        settings = folder / "tokenizer_config.json"
        self._settings = read_json(settings) if settings.exists() else {}
        self.chat_template = self._find_template(folder)

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with the tokens that the checkpoint puts round every text, unless told not to.

        Raises `ValueError` for a text that is not Unicode (half a surrogate pair).
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the text holds bytes that are no characters: give it in UTF-8") from None
        return self.fast.encode(text, add_special_tokens=special_tokens).ids

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.fast.decode(token_ids, skip_special_tokens=True)

    def stream(self) -> TextStream:
        """A decoder that takes one token after the other."""
        return TextStream(self.fast)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, ending where the assistant is to answer.

        `messages` is [{"role": "user", "content": "…"}, …]. Raises `ValueError` when the checkpoint has no chat template.
        """
        if self.chat_template is None:
            raise ValueError(
                "this checkpoint has no chat template: give plain prompts, or an instruction-tuned checkpoint"
            )
        names = {key: self._name(key) for key in ("bos_token", "eos_token")}
        try:
            template = _environment().from_string(self.chat_template)
            text = template.render(messages=messages, add_generation_prompt=True, **names)
        except TemplateError as error:
            raise ValueError(f"the checkpoint's chat template refuses these messages: {error}") from None
        return self.encode(text, special_tokens=False)

    def _name(self, key: str) -> str:
        value = self._settings.get(key) or ""
        return value.get("content", "") if isinstance(value, dict) else value

    def _find_template(self, folder: Path) -> str | None:
        if (folder / "chat_template.jinja").exists():
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        template = self._settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
        return template


class TextStream:
    """Turns tokens into text as they come; holds back what may be half a character."""

    def __init__(self, fast: FastTokenizer) -> None:
        self._fast = fast
        self._stream = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []

    def step(self, token_id: int) -> str:
        """The text that became certain with this token."""
        self._token_ids.append(token_id)
        try:
            return self._stream.step(self._fast, token_id) or ""
        except Exception:  # "invalid prefix": bytes that are no text by themselves; go on from here
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._fast, token_id) or ""

    def rest(self, text: str) -> str:
        """What the whole text has beyond `text`: a last character that was never completed."""
        whole = self._fast.decode(self._token_ids, skip_special_tokens=True)
        return whole[len(text) :] if whole.startswith(text) else ""


def _environment() -> ImmutableSandboxedEnvironment:
    """What chat templates are written for: a sandbox with `break`, and a way to refuse messages."""

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    functions: dict[str, Any] = {"raise_exception": raise_exception}
    environment.globals.update(functions)
    return environment
