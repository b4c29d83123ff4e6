"""`apb` as a model of EleutherAI's lm-evaluation-harness (the extra ``eval``).

``lm_eval --model apb --model_args model=smollm2-135m,method=apb,world_size=4 --tasks NAME`` finds
it by its entry point, which releases after 0.4.13 look up. ``python -m apb.evaluate.lm_eval`` is
the same command with any release.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from apb.errors import ApbError, InputError
from apb.hf.model import load_config
from apb.hf.tokenizer import load_tokenizer
from apb.llm import LLM
from apb.sampling import SamplingParams

_QUERY_TOKENS = 64
_MAX_GEN_TOKS = 256
"""Where a task does not say, as for the harness's own models."""
_SAMPLING = ("top_p", "top_k", "seed")
_ANY_DEVICE = (None, "cuda:0")
"""What the harness passes on where its user has said nothing, with and without a GPU."""


@register_model("apb")
class ApbLM(TemplateLM):
    """Prompts come as one text: all but its last tokens are the document, the last are the query.

    Args:
        model: a name in `conf/model/`, a local folder, a GGUF file or a Hub id.
        query_tokens: of a prompt to generate from, how many of its last ones are the query.
        max_length: of prompt and answer; by default the model's positions.
        device: `cpu` or `cuda`, for all ranks.
        batch_size, max_batch_size: there is one request at a time, so they change nothing.
        settings: any of apb's, such as ``method="apb"`` or ``world_size=4``; in Python those with a
            dot go in a mapping, ``**{"method.anchor_len": 256}``.
    """

    def __init__(
        self,
        model: str,
        *,
        query_tokens: int = _QUERY_TOKENS,
        max_length: int | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if query_tokens < 1:
            raise InputError(f"query_tokens={query_tokens} must be at least 1")
        if device not in _ANY_DEVICE:
            settings["device"] = device
        plain = {name: value for name, value in settings.items() if name.isidentifier()}
        dotted = [f"{name}={value}" for name, value in settings.items() if name not in plain]
        # The harness writes the prompt, with the chat template where it is asked for one.
        self._llm = LLM(model, overrides=["model.template=raw", *dotted], **plain)
        config = self._llm.config.model
        self.tokenizer = load_tokenizer(config)
        self.max_length = max_length or int(load_config(config).max_position_embeddings)
        self._query_tokens = query_tokens

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The turns as the model's own template writes them."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._llm.config.model.chat_template_kwargs,
        )
        return str(text)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; what the tokenizer begins with is put there once."""
        if add_special_tokens is None:
            start = str(self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = not string.startswith(start)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        results = []
        for pair, context, continuation in tqdm(requests, disable=disable_tqdm or None):
            # Prompts that are too long lose their beginning, as with the harness's own models.
            context = context[-max(1, self.max_length + 1 - len(continuation)) :]
            found = self._llm.likelihood(context, continuation)
            results.append((sum(found.logprobs), all(found.is_best)))
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, results[-1])
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The whole text's log-likelihood, each window after a single token.

        A window is read as rows after a context of one token, and so exactly, whatever the method.
        """
        results = []
        for text in tqdm([request.args[0] for request in requests], disable=disable_tqdm or None):
            windows = [(None, *window) for window in self._windows(text)]
            total = sum(value for value, _ in self._loglikelihood_tokens(windows, True))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            results.append(total)
        return results

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        return map(
            make_disjoint_window,
            get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ),
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each cut before the first of its stop strings."""
        results = []
        for request in tqdm(requests, disable=disable_tqdm or None):
            prompt, given = request.args
            params = self._sampling(given)
            ids = self.tok_encode(prompt)[-max(2, self.max_length - params.max_tokens) :]
            if len(ids) < 2:
                raise InputError(f"the prompt {prompt!r} has too few tokens to be split into two")
            cut = max(1, len(ids) - self._query_tokens)
            results.append(self._llm.ask(ids[:cut], ids[cut:], params).text)
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results

    def _sampling(self, given: dict[str, Any]) -> SamplingParams:
        """From what a task or the command line says about generation."""
        kwargs = dict(normalize_gen_kwargs(given, _MAX_GEN_TOKS))
        stop: Iterable[str] = handle_stop_sequences(
            kwargs.get("until"), eos=str(self.tokenizer.decode([self.eot_token_id]))
        )
        return SamplingParams(
            max_tokens=kwargs["max_gen_toks"],
            temperature=kwargs.get("temperature", 0.0),
            stop=tuple(text for text in stop if text),
            **{name: kwargs[name] for name in _SAMPLING if name in kwargs},
        )


def main() -> int:
    """The harness's command line; returns the exit code."""
    try:
        cli_evaluate()
    except ApbError as error:
        print(f"apb.evaluate.lm_eval: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
