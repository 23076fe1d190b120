"""Malformed inputs for the command line: ``python tests/malformed.py [COUNT [FIRST]]``.

Case ``n`` is a kind, damage and a command that follow from the seed ``n``. Each ends within `LIMIT` seconds in success
or one ``error:`` line; nothing that came with the input is executed, and what failed leaves no output that passes for
whole.
"""

import json
import os
import pickle
import queue
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

COUNT, LIMIT, MEMORY = 2000, 60, 8 << 30
TESTS = Path(__file__).parent
SMALL: list[Any] = [None, True, -1, 0, 1, 2, 0.5, float("nan"), float("inf"), "", "x", "../x", [], {}, [[]], {"a": {}}]
TEMPLATES = [
    "{{ messages[0].content }}", "{% if %}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{% for x in y %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{% include '/etc/passwd' %}", "{{ messages[9].x.y }}", "{{ messages | z }}", "\x00",
]  # fmt: skip
CALIBRATED = ("--calibration-tokens", "256", "--calibration-window", "64", "--copy-fraction", "0", "--measure", "0")


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


class Cases:
    """The undamaged inputs, made once, and the functions that damage a copy of one and name a command."""

    def __init__(self, root: Path):
        from fuzz.mutations import small_records
        from models.test_gguf import small, write
        from tiny_corpus import SEPARATOR, some_documents

        self.root, self.folder, self.canary = root, root / "case", root / "canary"
        self.ready = root / "ready"
        self.ready.mkdir(parents=True)
        self.model = self._model("model")
        self.sharded = self._model("sharded", max_shard_size="50kB")
        self.gguf = Path(write(self.ready / "m.gguf", small("llama"), "llama"))
        self.text = self.ready / "text.txt"
        self.text.write_text(SEPARATOR.join(some_documents()), encoding="utf-8")
        self.records = small_records()
        self.settings: dict[str, Any] = {
            "data": {"files": [str(self.text)], "separator": SEPARATOR, "vocabulary": 300, "validation_fraction": 0.1,
                     "validation_tokens": 512, "row": 32},
            "model": {"variant": "mea", "changes": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                                                     "num_attention_heads": 4, "num_key_value_heads": 4}},
            "optim": {"tokens": 512, "batch_tokens": 128, "warmup_tokens": 256},
            "run": {"validations": 2, "checkpoints": 2},
        }  # fmt: skip
        self.made: dict[str, Path] = {}

    def _model(self, name: str, **options: Any) -> Path:
        from compression.small import byte_tokenizer, tiny

        tiny(max_position_embeddings=256).save_pretrained(self.ready / name, **options)
        byte_tokenizer().save_pretrained(self.ready / name)
        return self.ready / name

    def arguments(self, number: int) -> list[str]:
        """Damage the inputs of case `number`, and give the command's arguments."""
        chance = random.Random(number)
        kinds = [getattr(self, name) for name in sorted(dir(self)) if name.startswith("of_")]
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        return list(map(str, kinds[number % len(kinds)](chance)))

    def _copy(self, source: Path) -> Path:
        copied = self.folder / source.name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copied)
        return copied

    def _command(self, model: Path, chance: random.Random) -> list[Any]:
        out = self.folder / "out"
        return chance.choice([
            ["generate", model, "--prompt", "once", "--max-new-tokens", "2"],
            ["perplexity", model, "--text", self.text, "--tokens", "128", "--window", "64", "--record", out / "r.json"],
            ["compress", model, out, "--dry-run"],
            ["compress", model, out, "--method", "svd", "--calibration-text", self.text, *CALIBRATED],
            ["compress", model, out, "--keep", "0.9", "--calibration-text", self.text, *CALIBRATED],
        ])  # fmt: skip

    def _damaged_json(self, source: Path, name: str, chance: random.Random) -> list[Any]:
        from fuzz.mutations import mutated_text

        path = self._copy(source) / name
        path.write_bytes(mutated_text(json.loads(path.read_text(encoding="utf-8")), chance))
        return self._command(path.parent, chance)

    def of_config(self, chance: random.Random) -> list[Any]:
        return self._damaged_json(self.model, "config.json", chance)

    def of_generation_config(self, chance: random.Random) -> list[Any]:
        return self._damaged_json(self.model, "generation_config.json", chance)

    def of_index(self, chance: random.Random) -> list[Any]:
        return self._damaged_json(self.sharded, "model.safetensors.index.json", chance)

    def of_weights(self, chance: random.Random) -> list[Any]:
        from fuzz.mutations import header_bytes, mutated_bytes, mutated_text

        model = self._copy(self.model)
        path = model / "model.safetensors"
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        if chance.random() < 0.5:
            path.write_bytes(header_bytes(mutated_text(header, chance), 0) + content[8 + length :])
        else:
            path.write_bytes(mutated_bytes(content[: 8 + length], chance) + content[8 + length :])
        return self._command(model, chance)

    def of_gguf(self, chance: random.Random) -> list[Any]:
        from fuzz.mutations import mutated_bytes, mutated_gguf

        content = self.gguf.read_bytes()
        at = content.find(b"tokenizer.ggml.tokens")
        part = chance.choice([at, at + 4000, content.find(b"token_embd") + 2000])
        path = self.folder / "m.gguf"
        if chance.random() < 0.2:
            path.write_bytes(mutated_gguf(chance))
        else:
            path.write_bytes(mutated_bytes(content[:part], chance) + content[part:])
        return self._command(path, chance)

    def of_tokenizer(self, chance: random.Random) -> list[Any]:
        return self._damaged_json(self.model, chance.choice(["tokenizer.json", "tokenizer_config.json"]), chance)

    def of_template(self, chance: random.Random) -> list[Any]:
        from fuzz.mutations import mutated_bytes

        model = self._copy(self.model)
        template = chance.choice(TEMPLATES).replace("CANARY", str(self.canary)).encode()
        template = mutated_bytes(template, chance) if chance.random() < 0.4 else template
        (model / "chat_template.jinja").write_bytes(template)
        return ["generate", model, "--prompt", "once", "--max-new-tokens", "2", "--chat"]

    def of_code(self, chance: random.Random) -> list[Any]:
        """What would run code: pickles, and modules named by ``auto_map``."""
        model = self._copy(self.model)
        trap = f"import os\nos.system('touch {self.canary}')\n"
        names = ["pytorch_model.bin", "model.safetensors", "adapter_model.bin", "training_args.bin", "optimizer.pt"]
        for name in chance.sample(names, 3):
            (model / name).write_bytes(pickle.dumps(Canary(self.canary)))
        (model / "trap.py").write_text(trap)
        (model / "custom_generate").mkdir()
        (model / "custom_generate" / "generate.py").write_text(trap)
        auto_map = {
            "AutoConfig": "trap.Trap",
            "AutoModelForCausalLM": "trap.Trap",
            "AutoTokenizer": ["trap.Trap", None],
        }
        for name in ("config.json", "tokenizer_config.json"):
            if chance.random() < 0.7:
                values = json.loads((model / name).read_text()) | {"auto_map": auto_map, "tokenizer_class": "Trap"}
                values |= {"model_type": chance.choice(["llama", "own", None])}
                (model / name).write_text(json.dumps(values))
        return self._command(model, chance)

    def of_record(self, chance: random.Random) -> list[Any]:
        from fuzz.mutations import mutated_text

        for index in range(chance.randint(1, 3)):
            (self.folder / f"{index}.json").write_bytes(mutated_text(chance.choice(self.records), chance))
        out = self.folder / "out"
        report = ["report", self.folder, "--out", out / "r.html", "--markdown", out / "r.md", "--csv", out / "r.csv"]
        return chance.choice([report, report, ["fit", self.folder, "--draws", "50", "--record", out / "fit.json"]])

    def of_layout(self, chance: random.Random) -> list[Any]:
        from fuzz.mutations import mutated_text

        (self.folder / "layout.json").write_bytes(mutated_text([[8, 8], None, [16, 24]], chance))
        options = [
            "--layout",
            self.folder / "layout.json",
            "--method",
            chance.choice(["svd", "gqa-mean", "predictive"]),
        ]
        return ["compress", self.model, self.folder / "out", *options, *CALIBRATED, "--dry-run"]

    def of_numbers(self, chance: random.Random) -> list[Any]:
        words = ["0", "-1", "nan", "inf", "1e400", "9" * 400, "0.5", "1", "2", "1e-9", "half", "", "1 in 1 b"]
        words += ["64k tokens in 1 GiB", "9e9 in 1 GB", f"{'9' * 400} in 1 GB", "٣ in 1 GB", "8 tokens in 30 kB"]
        names = [
            "keep",
            "budget",
            "refine",
            "groups",
            "calibration-tokens",
            "calibration-window",
            "copy-fraction",
            "dtype",
        ]
        names += ["measure", "seed", "device", "calibration-text", "method", "layout"]
        options = [part for name in chance.sample(names, 2) for part in (f"--{name}", chance.choice(words))]
        return ["compress", self.model, self.folder / "out", *options, "--dry-run"]

    def of_pretraining(self, chance: random.Random) -> list[Any]:
        tables = self._changed(self.settings, chance)
        if isinstance(tables, dict) and isinstance(optim := tables.setdefault("optim", {}), dict):
            optim.setdefault("tokens", 512)  # the default is a run of minutes
        self._toml("run.toml", tables, chance)
        return ["pretrain", self.folder / "run.toml", self.folder / "out", "--cache", self.root / "cache"]

    def of_sweep(self, chance: random.Random) -> list[Any]:
        stage = {"arms": ["mea", "small"], "learning_rates": [0.01], "seeds": [0], "change": {"optim": {"clip": 0.5}}}
        whole = self.settings | {"stage": [stage], "arms": {"small": {"model": {"variant": "mea"}}}, "keep": 0.5}
        self._toml("sweep.toml", self._changed(whole, chance), chance)
        work = ["--work", self.folder / "work", "--minutes", "0"]
        return ["sweep", self.folder / "sweep.toml", self.folder / "records", *work]

    def of_partial_compression(self, chance: random.Random) -> list[Any]:
        """Finished layers of an interrupted run that are damaged, exchanged, or not its own."""
        from fuzz.mutations import mutated_bytes

        out = self.folder / "out"
        command = ["compress", self.model, out, "--method", "svd", "--calibration-text", self.text, *CALIBRATED]
        layers = self._once("layers", lambda: self._interrupted(command))
        shutil.copytree(layers, self.folder / "out.partial" / "layers")
        files = sorted((self.folder / "out.partial" / "layers").iterdir())
        for path in chance.sample(files, min(2, len(files))):
            other = chance.choice(files)
            damage = chance.choice([b"", b"{}", mutated_bytes(path.read_bytes(), chance), other.read_bytes()])
            path.write_bytes(damage)
        return command

    def of_partial_pretraining(self, chance: random.Random) -> list[Any]:
        """A run's folder or its tokenised text with a damaged file."""
        from fuzz.mutations import mutated_bytes, mutated_text

        run = self._once("run", self._trained)
        shutil.copytree(run / "out", self.folder / "out")
        shutil.copytree(run / "cache", self.folder / "cache")
        shutil.copy(run / "run.toml", self.folder)
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file() and path.name != "run.toml"]
        chosen = [path for path in files if path.name in ("settings.json", "branch.json", "manifest.json")]
        path = chance.choice(chance.choice([files, chosen]))
        if path.suffix == ".json" and chance.random() < 0.7:
            path.write_bytes(mutated_text(json.loads(path.read_text(encoding="utf-8")), chance))
        elif path.suffix in (".pt", ".pth", ".bin"):
            path.write_bytes(pickle.dumps(Canary(self.canary)))
            self._mark_again(path.parent)
        else:
            path.write_bytes(mutated_bytes(path.read_bytes(), chance))
        return ["pretrain", self.folder / "run.toml", self.folder / "out", "--cache", self.folder / "cache"]

    def _mark_again(self, checkpoint: Path) -> None:
        from mea.train.checkpoints import mark_complete

        if checkpoint.name.startswith("checkpoint-"):
            mark_complete(checkpoint)

    def _once(self, name: str, make: Callable[[], Path]) -> Path:
        if name not in self.made:
            made = make()
            shutil.move(made, self.ready / name)
            self.made[name] = self.ready / name
        return self.made[name]

    def _interrupted(self, command: list[Any]) -> Path:
        from mea.compression import save

        kept, save.save_folder = save.save_folder, lambda *_, **__: (_ for _ in ()).throw(OSError("interrupted"))
        try:
            assert run(command)[0] == 2
        finally:
            save.save_folder = kept
        return self.folder / "out.partial" / "layers"

    def _trained(self) -> Path:
        made = self.folder / "trained"
        made.mkdir()
        (made / "run.toml").write_text(toml(self.settings))
        code, _, errors, _ = run(["pretrain", made / "run.toml", made / "out", "--cache", made / "cache"])
        assert code == 0, errors
        shutil.rmtree(made / "out" / "model")
        last = max((made / "out").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        shutil.rmtree(last)
        return made

    def _changed(self, tables: Any, chance: random.Random) -> Any:
        from fuzz import mutations

        every, mutations.NASTY = mutations.NASTY, SMALL  # large numbers ask for long runs, which is no mistake
        try:
            return mutations.mutated_json(tables, chance)
        finally:
            mutations.NASTY = every

    def _toml(self, name: str, tables: Any, chance: random.Random) -> None:
        from fuzz.mutations import mutated_bytes

        content = toml(tables).encode("utf-8", "replace") if isinstance(tables, dict) else b"x"
        if chance.random() < 0.15:
            content = chance.choice([mutated_bytes(content, chance), b"\xff", b"a = " + b"[" * 5000])
        (self.folder / name).write_bytes(content)


def toml(tables: dict[str, Any]) -> str:
    """Tables as a TOML document of inline values."""

    def value(x: Any) -> str:
        if isinstance(x, dict):
            return "{" + ", ".join(f"{json.dumps(str(key))} = {value(part)}" for key, part in x.items()) + "}"
        if isinstance(x, list):
            return "[" + ", ".join(map(value, x)) + "]"
        return str(x) if isinstance(x, float) else json.dumps("null" if x is None else x)

    return "".join(f"{json.dumps(str(key))} = {value(part)}\n" for key, part in tables.items())


def run(arguments: list[Any]) -> tuple[int, str, str, BaseException | None]:
    """The command line in this process: exit code, output, errors, and what it raised."""
    from typer.testing import CliRunner

    from mea.cli import app

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, list(map(str, arguments)))
    raised = None if isinstance(result.exception, SystemExit) else result.exception
    return result.exit_code, result.stdout, result.stderr, raised


def complaint(cases: Cases, arguments: list[str]) -> tuple[int, str]:
    """Exit code of one case, and what is wrong with its outcome; nothing if it is as promised."""
    code, _, errors, raised = run(arguments)
    return code, _complaint(cases, arguments, code, errors, raised)


def _complaint(cases: Cases, arguments: list[str], code: int, errors: str, raised: BaseException | None) -> str:
    if raised is not None:
        places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(raised.__traceback__)]
        own = [place for place in places if "/mea/" in place]
        return f"{type(raised).__name__}: {str(raised)[:200]!r} at {(own or places)[-1]}"
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    usage = "Usage:" in errors  # of a value that typer refuses
    if cases.canary.exists():
        cases.canary.unlink()
        return "code of the input was executed"
    if code and not usage and (code != 2 or len(lines) != 1 or len(lines[0]) < 20 or "Traceback" in errors):
        return f"exit code {code} and {len(lines)} error lines: {errors[-300:]!r}"
    out = cases.folder / "out"
    if code and arguments[0] in ("compress", "report", "perplexity", "fit") and out.exists():
        return f"failed, and left {sorted(path.name for path in out.rglob('*'))}"
    if code and arguments[0] == "compress" and (left := out.with_name("out.partial")).exists():
        others = [path.name for path in left.iterdir() if path.name != "layers"]
        return f"failed, and left {others} of unfinished work" if others else ""
    if (
        not code
        and arguments[0] == "compress"
        and "--dry-run" not in arguments
        and not (out / "compression.json").exists()
    ):
        return "success without a result"
    return ""


def work(first: int, last: int, every: int) -> None:
    """Try cases in this process, and print a line of JSON for each."""
    import logging

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    with tempfile.TemporaryDirectory() as root:
        cases = Cases(Path(root))
        for number in range(first, last, every):
            print(json.dumps([number, "begun"]), file=answers, flush=True)
            arguments = cases.arguments(number)
            code, said = complaint(cases, arguments)
            print(json.dumps([number, said, f"{arguments[0]} {code}"]), file=answers, flush=True)


def outcomes(count: int, first: int = 0, every: int = 1) -> Iterator[tuple[int, str, str]]:
    """Number, complaint, and command with its exit code, from worker processes; one that hangs or dies is replaced."""
    last = first + count * every
    while first < last:
        command = [sys.executable, __file__, "--worker", str(first), str(last), str(every)]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
        lines: queue.Queue[str] = queue.Queue()
        assert worker.stdout is not None
        threading.Thread(target=_pass_on, args=(worker.stdout, lines), daemon=True).start()
        try:
            limit = 3 * LIMIT  # to start
            while line := lines.get(timeout=limit):
                number, said, *what = json.loads(line)
                limit, first = LIMIT, number + every
                if said != "begun":
                    yield number, said, what[0]
            if first < last or worker.wait():
                yield first - every, "the process died", "?"
        except queue.Empty:
            yield first - every, f"no end after {limit} s", "?"
        finally:
            worker.kill()
            worker.wait()


def _pass_on(stream: Any, lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        sys.path[:0] = [str(TESTS)]
        work(*map(int, sys.argv[2:]))
        return
    wrong, codes = 0, Counter()
    for number, said, what in outcomes(*map(int, sys.argv[1:] or [COUNT])):
        codes[what] += 1
        if said:
            wrong += 1
            print(number, said, flush=True)
    print(", ".join(f"{what}: {count}" for what, count in sorted(codes.items())))
    print(f"{wrong} outcomes are wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
