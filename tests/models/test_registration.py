"""``import mea`` makes transformers' Auto classes know its models, whichever of the two is imported first."""

import json
import subprocess
import sys

import pytest

from compression.small import SIZES
from mea.models.config import MeaConfig
from mea.models.decoder import MeaForCausalLM
from mea.models.latent_attention import COMPRESSED_CONFIGS, COMPRESSED_MODELS

# Each runs in an interpreter that has imported neither, with `compressed` and `decoder`, folders of models.
PROGRAMS = {
    "mea first": """
        import mea
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
        assert "llama" in CONFIG_MAPPING and "mea_llama" in CONFIG_MAPPING and "mea_none" not in CONFIG_MAPPING
        assert "mea_llama" in list(CONFIG_MAPPING)
        assert type(AutoModelForCausalLM.from_pretrained(compressed)).__name__ == "MeaLlamaForCausalLM"
        assert type(AutoModelForCausalLM.from_pretrained(decoder)).__name__ == "MeaForCausalLM"

        class Theirs(PreTrainedConfig):
            model_type = "theirs"

        AutoConfig.register("theirs", Theirs)
        assert type(AutoConfig.for_model("theirs")) is Theirs
        assert type(AutoConfig.for_model("mea")).__name__ == "MeaConfig"
    """,
    "transformers first": """
        import transformers
        import transformers.models.auto.modeling_auto
        import mea
        assert type(transformers.AutoModelForCausalLM.from_pretrained(compressed)).__name__ == "MeaLlamaForCausalLM"
        assert type(transformers.AutoModelForCausalLM.from_pretrained(decoder)).__name__ == "MeaForCausalLM"
    """,
    "a stock model after mea": """
        import mea
        from transformers import LlamaForCausalLM  # imports the mappings half way through its own import
        from transformers import pipeline
        say = pipeline("text-generation", model=compressed, tokenizer=compressed)
        assert say("abc", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("abc")
    """,
    "modeling_utils after mea": """
        import mea
        import transformers.modeling_utils  # so does this
        from mea.models.config import MeaConfig
        from transformers import AutoModelForCausalLM
        config = MeaConfig.from_pretrained(decoder)
        assert type(AutoModelForCausalLM.from_config(config)).__name__ == "MeaForCausalLM"
    """,
    "an import that fails, and reloads": """
        import importlib
        import mea
        sys.modules["transformers.models.auto.auto_mappings"] = None
        try:
            import transformers.models.auto.configuration_auto
        except ImportError as error:
            assert "auto_mappings" in str(error), error
        else:
            raise AssertionError("no ImportError")
        del sys.modules["transformers.models.auto.auto_mappings"]
        from transformers import AutoConfig
        from transformers.models.auto import configuration_auto
        assert type(AutoConfig.from_pretrained(compressed)).__name__ == "MeaLlamaConfig"
        loader = configuration_auto.__loader__
        importlib.reload(configuration_auto)
        importlib.reload(mea)
        assert type(configuration_auto.__loader__) is type(loader) is type(configuration_auto.__spec__.loader)
        assert configuration_auto.__loader__.get_source(configuration_auto.__name__)
        assert "mea" in configuration_auto.CONFIG_MAPPING
        assert sum(type(finder).__name__ == "MappingFinder" for finder in sys.meta_path) == 1
    """,
    "objects sent to another process": """
        import multiprocessing, pickle
        import mea
        from transformers import CONFIG_MAPPING, AutoConfig
        pickle.loads(pickle.dumps(CONFIG_MAPPING))
        config = AutoConfig.from_pretrained(decoder)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.apply(repr, (config,)) == repr(config)
    """,
}
# One interpreter that has imported torch, which takes longest, forks for every program.
RUNNER = """
import json, os, sys, textwrap, traceback
import torch
compressed, decoder = sys.argv[1:]
for name, program in json.load(sys.stdin).items():
    sys.stdout.flush()
    if os.fork() == 0:
        status = ""
        try:
            exec(compile(textwrap.dedent(program), name, "exec"), {**globals(), "__name__": "program"})
        except BaseException:
            status = traceback.format_exc()
        print("\\n" + json.dumps([name, status]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def outcomes(tokenizer, tmp_path_factory) -> dict[str, str]:
    """The traceback of every program, or nothing."""
    compressed, decoder = (tmp_path_factory.mktemp(name) for name in ("compressed", "decoder"))
    config = COMPRESSED_CONFIGS["llama"](**SIZES, latent_ranks=[[8, 8]] * SIZES["num_hidden_layers"])
    COMPRESSED_MODELS["llama"](config).save_pretrained(compressed)
    tokenizer.save_pretrained(compressed)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    MeaForCausalLM(MeaConfig(**sizes, num_attention_heads=2, attention="gqa")).save_pretrained(decoder)
    command = [sys.executable, "-c", RUNNER, compressed, decoder]
    run = subprocess.run(command, input=json.dumps(PROGRAMS), capture_output=True, text=True, check=True)
    return dict(json.loads(line) for line in run.stdout.splitlines() if line.startswith('["'))


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_auto_classes_know_the_models_after(name, outcomes):
    assert outcomes[name] == ""
