"""A captioner on this machine: any image-text-to-text or text-generation model of transformers, in batches."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from ..recipe import CaptionerConfig
from ..sources.images import downscale
from .captioner import Answer, CaptionerDown, NoAnswer, Request, Sampling, captioner_id, captioner_identity


class RowSampler(LogitsProcessor):
    """
    Sampling whose randomness is each row's own: temperature and top-p, then Gumbel noise from the row's generator, so
    that the largest score is a draw from the distribution (Gumbel-max). What a row draws does not depend on its batch.
    """

    def __init__(self, samplings: Sequence[Sampling], device: torch.device):
        self.samplings = samplings
        self.generators = [torch.Generator(device).manual_seed(sampling.seed) for sampling in samplings]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = scores.float().clone()  # (B, vocabulary)
        for row, (sampling, generator) in enumerate(zip(self.samplings, self.generators, strict=True)):
            if sampling.temperature == 0:
                continue
            logits = chosen[row] / sampling.temperature
            if sampling.top_p < 1:
                ranked, order = logits.sort(descending=True)
                before = ranked.softmax(dim=-1).cumsum(dim=-1) - ranked.softmax(dim=-1)
                logits[order[before >= sampling.top_p]] = -torch.inf
            noise = torch.empty_like(logits).exponential_(generator=generator).log_()
            chosen[row] = logits - noise  # Gumbel noise is minus the logarithm of an exponential draw
        return chosen


class TransformersCaptioner:
    """
    Args:
        config: of kind `transformers`; the model is loaded with the first batch.
        settle: called when a request begins to wait; [`release`] is called in return when no other can come.
    """

    def __init__(self, config: CaptionerConfig, settle: Callable[[], None]):
        self.config, self.id, self.identity = config, captioner_id(config), captioner_identity(config)
        self._settle = settle
        self.waiting: list[tuple[Request, asyncio.Future]] = []
        self._engine: Engine | None = None
        self._at_work: set[asyncio.Task] = set()

    async def ask(self, request: Request) -> Answer:
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((request, future))
        self._settle()
        return await future

    def release(self) -> None:
        """Starts on all that waits: sorted by length, in batches of equal size or less."""
        waiting, self.waiting = self.waiting, []
        task = asyncio.create_task(self._work(waiting))
        self._at_work.add(task)
        task.add_done_callback(self._at_work.discard)

    async def close(self) -> None:
        self._engine = None

    async def _work(self, waiting: list[tuple[Request, asyncio.Future]]) -> None:
        try:
            if self._engine is None:
                self._engine = await asyncio.to_thread(Engine, self.config)
            results = await asyncio.to_thread(self._engine.answer_all, [request for request, _ in waiting])
        except Exception as error:
            results = [error] * len(waiting)
        for (_, future), result in zip(waiting, results, strict=True):
            if future.done():  # an interrupted build waits no longer
                continue
            if isinstance(result, Answer):
                future.set_result(result)
            else:
                future.set_exception(result)


class Engine:
    """
    A loaded model.

    Raises:
        [`CaptionerDown`]: for a model that cannot be loaded or has no chat template.
    """

    def __init__(self, config: CaptionerConfig):
        self.config = config
        options = {"revision": config.revision or "main", "trust_remote_code": config.trust_remote_code}
        try:
            model_config = AutoConfig.from_pretrained(config.model, **options)
            self.sees = model_config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
            model_class = AutoModelForImageTextToText if self.sees else AutoModelForCausalLM
            self.processor = _load_processor(config.model, model_config.model_type, self.sees, options)
            placed = json.loads(config.device_map) if config.device_map.startswith("{") else config.device_map
            placement = {} if placed == "cpu" else {"device_map": placed}
            dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
            self.model = model_class.from_pretrained(config.model, dtype=dtype, **placement, **options)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
            raise CaptionerDown(f"captioner {config.model} cannot be loaded: {reason}") from error
        self.model.eval()
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if not (getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template):
            raise CaptionerDown(f"captioner {config.model} has no chat template; take an instruction-tuned model.")

    def answer_all(self, requests: list[Request]) -> list[Answer | Exception]:
        """An answer or the reason there is none for every request, in their order."""
        order = sorted(range(len(requests)), key=lambda at: (bool(requests[at].picture), len(requests[at].user), at))
        results: dict[int, Answer | Exception] = {}
        for start in range(0, len(order), self.config.batch_size):
            chosen = order[start : start + self.config.batch_size]
            results |= dict(zip(chosen, self._answer_batch([requests[index] for index in chosen]), strict=True))
        return [results[index] for index in range(len(requests))]

    def _answer_batch(self, requests: list[Request]) -> list[Answer | Exception]:
        try:
            return self._generate(requests)
        except torch.OutOfMemoryError as error:
            reason = str(error)[:100]
        # Out here, where the error and with it the batch's tensors are gone.
        torch.cuda.empty_cache()
        if len(requests) == 1:
            return [NoAnswer(f"out of memory: {reason}")]
        middle = len(requests) // 2
        return self._answer_batch(requests[:middle]) + self._answer_batch(requests[middle:])

    @torch.inference_mode()
    def _generate(self, requests: list[Request]) -> list[Answer | Exception]:
        inputs = self.inputs(requests)
        sampler = RowSampler([request.sampling for request in requests], self.model.device)
        ids = self.model.generate(
            **inputs,
            max_new_tokens=max(request.sampling.max_tokens for request in requests),
            do_sample=False,  # the sampler has drawn already
            **dict.fromkeys(("temperature", "top_p", "top_k")),
            num_beams=1,
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([sampler]),
        )
        written = ids[:, inputs["input_ids"].shape[1] :].tolist()  # (B, new tokens)
        return [self._read(row, request) for row, request in zip(written, requests, strict=True)]

    def inputs(self, requests: list[Request]) -> Any:
        """Inputs of the model for these conversations, padded on the left: `input_ids` (B, L), images where it sees."""
        if any(request.picture for request in requests) and not self.sees:
            raise CaptionerDown(f"captioner {self.config.model} reads no images; its prompt needs one that does.")
        texts = [self._chat(request) for request in requests]
        if self.sees:
            pictures = [request.picture for request in requests if request.picture]
            images = [[downscale(picture.image, self.config.max_image_side)] for picture in pictures]
            inputs = self.processor(text=texts, images=images or None, padding=True, return_tensors="pt")
        else:
            inputs = self.tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        inputs = inputs.to(self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs

    def _chat(self, request: Request) -> str:
        """The conversation in the model's template; templates without a system turn get its words before the user's."""

        def turn(role: str, text: str) -> dict[str, Any]:
            image = [{"type": "image"}] * (role == "user" and request.picture is not None)
            return {"role": role, "content": [*image, {"type": "text", "text": text}] if self.sees else text}

        turns = [turn("system", request.system), turn("user", request.user)]
        template = getattr(self.processor, "apply_chat_template", self.tokenizer.apply_chat_template)
        try:
            return template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja2's own, where the template raises
            if "system" not in str(error).lower():
                raise
            turns = [turn("user", f"{request.system}\n\n{request.user}")]
            return template(turns, tokenize=False, add_generation_prompt=True)

    def _read(self, ids: list[int], request: Request) -> Answer:
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        end = next((end for end, token in enumerate(ids) if token in ends), None)
        return Answer(self.tokenizer.decode(ids[:end], skip_special_tokens=True), end is not None)


def _load_processor(name: str, model_type: str, sees: bool, options: dict[str, Any]) -> Any:
    if not sees:
        return AutoTokenizer.from_pretrained(name, **options)
    with contextlib.suppress(ImportError):
        return AutoProcessor.from_pretrained(name, **options)
    # The model also takes videos, and that part of its processor needs torchvision: the others do without it.
    if model_type not in PROCESSOR_MAPPING_NAMES:
        raise ImportError(f"the processor of {model_type} needs torchvision; install it")
    known = getattr(transformers, PROCESSOR_MAPPING_NAMES[model_type])

    class ImagesOnly(known):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(name, **options),
        "tokenizer": AutoTokenizer.from_pretrained(name, **options),
    }
    values, _ = known.get_processor_dict(name, revision=options["revision"])
    values.setdefault("chat_template", parts["tokenizer"].chat_template)
    return ImagesOnly.from_args_and_dict([parts.get(part) for part in known.get_attributes()], values)
