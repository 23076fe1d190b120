"""Every way of generating, for every architecture and form of cache: what is right, and what is refused in which words.

``python scripts/conformance.py`` runs all cells on tiny models in fp64 and writes the record and docs/conformance.md;
``--page`` writes the page from the record; ``--check`` fails where the page is not what the record says.
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
RECORD, PAGE = ROOT / "docs/conformance.json", ROOT / "docs/conformance.md"
KINDS = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "granite")
FORMS = ("predictive", "joint", "post_rope", "pre_rope", "shared", "quantised")
CODED, LATENT = FORMS[:2], {"post_rope": "post_rope", "pre_rope": "pre_rope", "shared": "joint"}
NEAR = 1e-6  # of the largest logit: the reading of pre_rope and shared has a softmax in fp32
EXACT_TEXT = "cache"  # a byte-level tokenizer's ids of these letters are in the tiny vocabulary


class NotOfThisForm(Exception):
    """The way has no meaning for the form."""


@dataclass
class Subject:
    """A tiny model with a form of cache, and its original."""

    kind: str
    form: str
    model: Any
    original: Any

    def tested(self) -> Any:
        """The cache to generate with; None for the model's own."""
        if self.form != "quantised":
            return None
        from mea.models.quantized_cache import CacheFormat, QuantisedCache

        return QuantisedCache(self.model.config, CacheFormat(8, block=8, first=2))

    def oracle(self) -> dict[str, Any]:
        """Options of the same call by other means: no cache; of a quantised cache, plain tensors quantised anew."""
        return {"past_key_values": anew(self.model.config)} if self.form == "quantised" else {"use_cache": False}

    def own(self) -> dict[str, Any]:
        made = self.tested()
        return {} if made is None else {"past_key_values": made}

    def only_with_own_cache(self) -> None:
        """For ways that concern the model rather than a cache that is given to it."""
        if self.form == "quantised":
            raise NotOfThisForm


def anew(config: Any) -> Any:
    """A cache that keeps all tokens in plain tensors, and quantises them anew at every reading."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    from mea.models.quantized_cache import CacheFormat, Store

    class Anew(DynamicLayer):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            before = [x.clone() for x in (self.keys, self.values)] if self.is_initialized else [None, None]
            super().update(key_states, value_states)
            form, read = CacheFormat(8, block=8, first=2), []
            for old, new, along in zip(before, (key_states, value_states), (form.keys, form.values), strict=True):
                store = Store(form, along)
                if old is not None:
                    store.append(old)
                read.append(store.append(new))
            return tuple(read)

    made = DynamicCache(config=config)
    made.layers = [Anew() if type(layer) is DynamicLayer else layer for layer in made.layers]
    return made


@cache
def subject(kind: str, form: str) -> Subject:
    """Made once from a fixed seed."""
    import torch

    from coded_models import coded, original
    from tiny_models import EVEN, REDUCED, compress

    torch.manual_seed(0)
    stock = original(kind).double()
    if form in CODED:
        return Subject(kind, form, coded(kind, form, ordinary=kind in ("llama", "gemma3_text")), stock)
    if form == "quantised":
        return Subject(kind, form, stock, stock)
    made = compress(original(kind), EVEN if form == "shared" else REDUCED, LATENT[form]).double()
    made.config._experts_implementation = "eager"
    return Subject(kind, form, made, stock)


def near(found: Any, expected: Any) -> None:
    """Assert that logits are equal but for rounding."""
    error, size = (found - expected).abs().max().item(), expected.abs().max().item()
    assert error <= NEAR * size, f"logits differ by {error:.1e} of {size:.1e}"


def logits(model: Any, ids: Any, **options: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(ids, **options).logits


def same(s: Subject, ids: Any, model: Any = None, expected: dict[str, Any] | None = None, **options: Any) -> None:
    """Assert that the model generates the same tokens with its cache and by the oracle."""
    import torch

    from tiny_models import generate

    options, found = {"max_new_tokens": 8, **options}, []
    for more in (s.oracle() if expected is None else expected, s.own()):
        torch.manual_seed(1)
        found.append(generate(model or s.model, ids, **(options | more)))
    assert torch.equal(*found), "other tokens"


def parts(s: Subject, ids: Any, sizes: tuple[int, ...], past: Any = None, mask: Any = None) -> tuple[Any, Any]:
    """Logits of a text in calls of these sizes, and the cache."""
    import torch

    found, at = [], 0
    past = s.tested() if past is None else past
    for size in sizes:
        more = {} if mask is None else placed(mask[:, : at + size], size)
        with torch.no_grad():
            out = s.model(ids[:, at : at + size], past_key_values=past, use_cache=True, **more)
        past, at = out.past_key_values, at + size
        found.append(out.logits)
    return torch.cat(found, 1), past


def placed(mask: Any, count: int) -> dict[str, Any]:
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)[:, -count:]}


def reference(s: Subject, ids: Any, sizes: tuple[int, ...], mask: Any = None) -> Any:
    """The logits that `parts` should give."""
    if s.form == "quantised":
        return parts(s, ids, sizes, anew(s.model.config), mask)[0]
    return logits(s.model, ids, use_cache=False, **({} if mask is None else placed(mask, ids.shape[1])))


def tokens(*shape: int) -> Any:
    import torch

    return torch.randint(1, 99, shape, generator=torch.Generator().manual_seed(sum(shape)))


def greedy(s: Subject) -> None:
    same(s, tokens(2, 21), max_new_tokens=12)


def sampling(s: Subject) -> None:
    same(s, tokens(2, 21), do_sample=True, temperature=1.5, num_return_sequences=2)


def beams(s: Subject) -> None:
    same(s, tokens(2, 21), num_beams=3, num_return_sequences=2)


def left_padding(s: Subject) -> None:
    """Rows with 1 to 9 and 137 padding tokens against the rows alone; quantised: against the batch by the oracle."""
    import torch

    paddings = (*range(10), 137)
    mask = (torch.arange(150) >= torch.tensor(paddings)[:, None]).long()
    ids, sizes = tokens(len(paddings), 150) * mask, (20, 100, 27, 1, 1, 1)
    found = parts(s, ids, sizes, mask=mask)[0]
    near(found[mask.bool()], reference(s, ids, sizes, mask)[mask.bool()])
    for row in (1, 5, 9, 10) if s.form != "quantised" else ():
        near(found[row, paddings[row] :], logits(s.model, ids[row : row + 1, paddings[row] :], use_cache=False)[0])


def unequal_batch(s: Subject) -> None:
    import torch

    from tiny_models import generate

    short, long = tokens(1, 4), tokens(1, 19)
    batch = torch.cat([torch.cat([torch.zeros(1, 15, dtype=torch.long), short], 1), long])
    mask = (batch != 0).long()
    same(s, batch, attention_mask=mask)
    if s.form != "quantised":  # whose scales are shared by tokens, padding among them
        together = generate(s.model, batch, attention_mask=mask, max_new_tokens=8)[:, 19:]
        for row, ids in zip(together, (short, long), strict=True):
            assert torch.equal(row, generate(s.model, ids, max_new_tokens=8)[0, ids.shape[1] :]), "other tokens"


def static(s: Subject) -> None:
    same(s, tokens(2, 21), cache_implementation="static")


def given_caches(s: Subject) -> None:
    """Empty caches with the model's windows: dynamic and static ones."""
    from transformers import DynamicCache, StaticCache

    s.only_with_own_cache()
    for length in (3, 21):
        for make in (DynamicCache, lambda config, n=length: StaticCache(config=config, max_cache_len=n + 10)):
            without = {"use_cache": False, "past_key_values": None}
            same(s, tokens(2, length), expected=without, past_key_values=make(config=s.model.config))


def chunked_prefill(s: Subject) -> None:
    at_once = s.oracle() | ({"prefill_chunk_size": None} if s.form != "quantised" else {})
    same(s, tokens(2, 21), expected=at_once, prefill_chunk_size=5)
    ids, sizes = tokens(2, 31), (3, 13, 5, 1, 1, 8)
    near(parts(s, ids, sizes)[0], reference(s, ids, sizes))


def prefix_reuse(s: Subject) -> None:
    import torch

    from tiny_models import generate

    prompt = tokens(2, 16)
    caches = [parts(s, prompt, (16,))[1]]
    caches += [parts(s, prompt, (16,), anew(s.model.config))[1]] if s.form == "quantised" else [None]
    for number in range(2):
        ids = torch.cat([prompt, tokens(2, 3 + number)], 1)
        found, expected = (
            generate(
                s.model, ids, **({"use_cache": False} if past is None else {"past_key_values": copy.deepcopy(past)})
            )
            for past in caches
        )
        assert torch.equal(found, expected), "other tokens"


def cropping(s: Subject) -> None:
    """Tokens after the beginning of the record are removed, and others come instead."""
    import torch

    ids = tokens(2, 40)
    _, past = parts(s, ids, (20,))
    past.activate_past_recording()
    parts(s, ids[:, 20:], (9, 1, 10), past)
    past.crop(-9)
    other = torch.cat([ids[:, :31], tokens(2, 12)], 1)
    near(parts(s, other[:, 31:], (3, 1, 1, 7), past)[0], logits(s.model, other, use_cache=False)[:, 31:])


def assisted_target(s: Subject) -> None:
    same(s, tokens(1, 16).repeat(1, 2), assistant_model=s.original, expected=s.oracle() | {"assistant_model": None})


def assisted_draft(s: Subject) -> None:
    s.only_with_own_cache()
    ids = tokens(1, 16).repeat(1, 2)
    same(s, ids, s.original, {"assistant_model": None}, assistant_model=s.model)


def prompt_lookup(s: Subject) -> None:
    options = {"prompt_lookup_num_tokens": 3}
    same(s, tokens(1, 16).repeat(1, 2), expected=s.oracle() | {"prompt_lookup_num_tokens": None}, **options)


def embeddings(s: Subject) -> None:
    import torch

    from tiny_models import generate

    ids = tokens(2, 21)
    embedded = s.model.get_input_embeddings()(ids).detach()
    if s.form != "quantised":
        near(logits(s.model, None, inputs_embeds=embedded, use_cache=False), logits(s.model, ids, use_cache=False))
    found = s.model.generate(inputs_embeds=embedded, max_new_tokens=8, do_sample=False, **s.own())
    assert torch.equal(found, generate(s.model, ids, max_new_tokens=8, **s.oracle())[:, 21:]), "other tokens"


def long_prompts(s: Subject) -> None:
    """Longer than the configuration's positions, 256."""
    same(s, tokens(1, 270), max_new_tokens=4)


def peft_updates(s: Subject) -> None:
    """With an update on top, and with it merged."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    made = get_peft_model(copy.deepcopy(s.model), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    made = made.double().eval()
    ids = tokens(2, 21)
    same(s, ids, made)
    before = logits(made, ids, use_cache=False)
    assert (before - logits(s.model, ids, use_cache=False)).abs().max() > 1e-3, "the update does nothing"
    merged = made.merge_and_unload()
    near(logits(merged, ids, use_cache=False), before)
    same(s, ids, merged)


def gradient_checkpointing(s: Subject) -> None:
    s.only_with_own_cache()
    ids, found = tokens(2, 21), []
    for on in (False, True):
        model = copy.deepcopy(s.model).train()
        if on:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        found.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
    assert found[0].keys() == found[1].keys(), "other gradients"
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).abs().max() <= NEAR * (1 + gradient.abs().max()), f"gradient of {name}"


def pipelines(s: Subject) -> None:
    from transformers import pipeline

    from compression.small import byte_tokenizer
    from tiny_models import generate

    tokenizer = byte_tokenizer()
    say = pipeline("text-generation", model=s.model, tokenizer=tokenizer, device="cpu")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    found = say(EXACT_TEXT, return_tensors=True, **options, **s.own())[0]["generated_token_ids"][-8:]
    ids = tokenizer(EXACT_TEXT, return_tensors="pt").input_ids
    assert found == generate(s.model, ids, **options, **s.oracle())[0, -8:].tolist(), "other tokens"


def saved_twice(s: Subject) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    s.only_with_own_cache()
    model = s.model
    with tempfile.TemporaryDirectory() as folder:
        for name in ("once", "twice"):
            model.save_pretrained(Path(folder, name))
            model = AutoModelForCausalLM.from_pretrained(Path(folder, name), trust_remote_code=False).eval()
            model.config._experts_implementation = s.model.config._experts_implementation
    stored = model.state_dict()
    for name, tensor in s.model.state_dict().items():
        assert torch.equal(stored[name], tensor), name
    near(logits(model, tokens(2, 21)), logits(s.model, tokens(2, 21)))


@cache
def elsewhere() -> dict[str, Any]:
    """Name -> class, logits and tokens of all saved models, in a process that cannot import this package."""
    import torch

    from models.test_latent_attention_saving import WITHOUT_THIS_PACKAGE

    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            for form in FORMS[:-1]:
                subject(kind, form).model.save_pretrained(Path(folder, "models", f"{kind}-{form}"))
        torch.save(tokens(2, 21), Path(folder, "ids.pt"))
        files = [str(Path(folder, name)) for name in ("models", "ids.pt", "results.pt")]
        environment = os.environ | {"HF_MODULES_CACHE": str(Path(folder, "modules")), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", WITHOUT_THIS_PACKAGE, *files]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return torch.load(files[-1])


def without_this_package(s: Subject) -> None:
    import torch

    from tiny_models import generate

    s.only_with_own_cache()
    _, found, generated = elsewhere()[f"{s.kind}-{s.form}"]
    near(found, logits(s.model, tokens(2, 21)))
    assert torch.equal(generated, generate(s.model, tokens(2, 21), max_new_tokens=8)), "other tokens"


WAYS: dict[str, Callable[[Subject], None]] = {
    "greedy": greedy,
    "sampling with a seed, several sequences": sampling,
    "beams, several sequences": beams,
    "left padding by 1 to 9 and 137": left_padding,
    "a batch of unequal prompts": unequal_batch,
    'cache_implementation="static"': static,
    "given empty caches, dynamic and static": given_caches,
    "prefill in chunks": chunked_prefill,
    "a prefix reused": prefix_reuse,
    "cropping a recorded past": cropping,
    "assisted decoding, as the target": assisted_target,
    "assisted decoding, as the draft": assisted_draft,
    "candidates from the prompt": prompt_lookup,
    "inputs_embeds": embeddings,
    "prompts longer than the positions": long_prompts,
    "PEFT on top and merged": peft_updates,
    "gradient checkpointing": gradient_checkpointing,
    'pipeline("text-generation")': pipelines,
    "save_pretrained twice": saved_twice,
    "loaded without this package": without_this_package,
}


def outcome(way: str, kind: str, form: str) -> str:
    """``"ok"``, ``"–"`` where the way has no meaning, ``"refused: ..."`` or ``"wrong: ..."``."""
    try:
        WAYS[way](subject(kind, form))
    except NotOfThisForm:
        return "–"
    except AssertionError as error:
        return f"wrong: {error}"
    except Exception as error:
        own = any("/mea/" in frame.filename for frame in traceback.extract_tb(error.__traceback__)[-2:])
        said = " ".join(str(error).split())
        refusal = isinstance(error, ValueError | NotImplementedError) or (isinstance(error, RuntimeError) and own)
        return f"refused: {said}" if refusal else f"wrong: {type(error).__name__}: {said[:200]}"
    return "ok"


def page(record: dict[str, Any]) -> str:
    """The table in Markdown, of a record."""
    cells, notes = record["results"]["cells"], []
    lines = [f"| | {' | '.join(FORMS)} |", "|" + "---|" * (len(FORMS) + 1)]
    for way in cells:
        line = []
        for form in FORMS:
            found = cells[way][form]
            said = {text: [kind for kind in KINDS if found.get(kind) == text] for text in dict.fromkeys(found.values())}
            shown = []
            for text, kinds in said.items():
                word, _, sentence = text.partition(": ")
                if sentence and sentence not in notes:
                    notes.append(sentence)
                word += f" [{notes.index(sentence) + 1}]" if sentence else ""
                shown.append(word if len(said) == 1 else f"{word} ({', '.join(kinds)})")
            line.append("; ".join(shown))
        lines.append(f"| {way} | {' | '.join(line)} |")
    numbered = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([INTRODUCTION, *lines, "", *([REFUSALS, "", *numbered] if notes else [])]) + "\n"


INTRODUCTION = f"""# Conformance

Each cell tests one way of generating with one kind of cache, on tiny random models in fp64 of the
architectures {", ".join(KINDS[:5])}, {", ".join(KINDS[5:])}.
The result must equal that of the same call without a cache. The oracle of a quantised cache is a
cache that stores exact tensors and quantises them at every step.

- "ok": tokens are equal and logits differ by rounding only, for the named architectures or all.
- "refused": an error before any result; its text is below.
- "–": the row does not apply to this cache.

The tests marked `compile` cover `torch.compile` of a decoding step.

`predictive` and `joint` are the packed caches of `mea compress`; `post_rope`, `pre_rope` and
`shared` are the caches of the baselines; `quantised` is the cache of `--cache-bits`.
`python scripts/conformance.py` repeats the tests and writes `docs/conformance.json` and this page.
"""
REFUSALS = "Refusals:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), help="only these: other cells stay as recorded")
    parser.add_argument("--forms", nargs="*", default=FORMS)
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from mea.records import make_record, read_record, write_record

    if given.check:
        same_page = PAGE.read_text(encoding="utf-8") == page(read_record(RECORD))
        sys.exit(0 if same_page else f"{PAGE} is not what {RECORD} says")
    if not given.page:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        cells: dict[str, Any] = {way: {form: {} for form in FORMS} for way in WAYS}
        for way, by_form in (read_record(RECORD)["results"]["cells"] if RECORD.exists() else {}).items():
            for form, found in by_form.items() if way in cells else ():
                cells[way][form] |= found
        for way in given.ways:
            for form in given.forms:
                for kind in given.kinds:
                    cells[way][form][kind] = found = outcome(way, kind, form)
                    if found not in ("ok", "–"):
                        print(f"{way}, {form}, {kind}: {found[:300]}", flush=True)
        config = {"architectures": KINDS, "forms": FORMS, "dtype": "float64"}
        write_record(RECORD, make_record("conformance", config, results={"cells": cells}, seeds={"weights": 0}))
    PAGE.write_text(page(read_record(RECORD)), encoding="utf-8")


if __name__ == "__main__":
    main()
