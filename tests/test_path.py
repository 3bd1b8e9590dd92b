"""The files that one batch passes on its way from a ``.beton`` file to the loss, on a CPU."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "architecture.md"
MOST_FILES = 15

PROGRAM = """
import functools, json, pathlib, sys, threading
from models.encoders import build_encoder
from models.moco import MoCo
from pipelines import Mixing, build_loader
from pipelines.recipe import moco_v2

root, beton = map(pathlib.Path, sys.argv[1:])
packages = {"models", "pipelines"}
loader = build_loader(beton, moco_v2(32, Mixing(method="mixmask", grid_size=4)), batch_size=8, num_threads=1)
model = MoCo(functools.partial(build_encoder, "resnet10w16"), method="mixmask", queue_len=64, bn_splits=2)
files = set()

def note(frame, event, argument):
    files.add(frame.f_code.co_filename)

def train_one_batch():
    batches = iter(loader)
    loss, _ = model(next(batches))
    loss.backward()
    batches.close()

def note_kernels(kernel):
    # A kernel that is loaded from disk says nothing of those that it calls, so they are looked up by name.
    if kernel not in kernels:
        kernels.add(kernel)
        files.add(kernel.py_func.__code__.co_filename)
        for name in kernel.py_func.__code__.co_names:
            called = kernel.py_func.__globals__.get(name)
            if hasattr(called, "py_func"):
                note_kernels(called)

train_one_batch()  # compiles the kernels
threading.setprofile(note)
sys.setprofile(note)
train_one_batch()
sys.setprofile(None)
kernels = set()
for name, module in list(sys.modules.items()):
    if name.split(".")[0] in packages:
        for value in list(vars(module).values()):
            if getattr(value, "signatures", None) and hasattr(value, "py_func"):
                note_kernels(value)
ours = (pathlib.Path(file) for file in files if pathlib.Path(file).is_relative_to(root))
ours = (file.relative_to(root) for file in ours)
print(json.dumps(sorted(str(file) for file in ours if file.parts[0] in packages)))
"""


def test_a_batch_passes_few_files(beton: Path) -> None:
    """Functions and kernels of ours that run for one batch, once the loader is open."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ROOT, beton], capture_output=True, text=True, check=True, cwd=ROOT
    )
    files = json.loads(done.stdout)
    table = re.search(r"<!-- path: begin -->(.*)<!-- path: end -->", DOCUMENT.read_text(), re.DOTALL)
    assert table is not None
    documented = re.findall(r"^\| \d+ \| `(.*?)`", table.group(1), re.MULTILINE)
    assert sorted(documented) == files, "name the files of a batch's way in docs/architecture.md"
    assert len(files) <= MOST_FILES
