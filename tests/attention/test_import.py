"""The modules are for anybody's plain PyTorch model: they must not drag in Hugging Face."""

import subprocess
import sys


def test_the_modules_need_pytorch_only():
    code = "import sys, mea.attention; print(sorted({'transformers', 'accelerate', 'safetensors'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
