"""Pack what benchmarks/on_gpu.sh needs on a machine that has torch and no network.

    benchmarks/on_gpu.sh pack
    benchmarks/on_gpu.sh pack --python 3.11 --cuda 12.8

It runs where lit_ft is installed (`make setup`), and fills benchmarks/packed: wheels of what lit_ft
and the tests depend on, in the versions that are installed here, SmolLM2's tokenizer, and the
Python code of torch's chunked loss, which a torch older than lit_ft asks for has not. Left out are
torch, what is large and mostly there already, and what the runs do not use: see --without.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch.nn import functional
from torch.nn.modules import linear_cross_entropy, linear_cross_entropy_options

from support.smollm2 import SMOLLM2

ROOT = Path(__file__).parents[2]
PACKED = ROOT / "benchmarks" / "packed"
_FOR_TESTS = ("pytest", "pytest-timeout", "pytest-xdist")
_SOURCES_ALONE = ("antlr4-python3-runtime",)  # pure Python, and never published as a wheel
_WITHOUT = ("numpy", "pandas", "pillow", "pyarrow", "setuptools")
_WITHOUT += ("hf-xet",)  # downloads from the hub
_WITHOUT += ("grpcio", "tensorboard-data-server")  # show what tensorboard has written
_GLIBC = (17, 24, 26, 27, 28, 31, 34)  # pip matches the number in a wheel's name exactly


def main() -> None:
    """Create the folder again, and print its size."""
    options = _parser().parse_args()
    shutil.rmtree(PACKED, ignore_errors=True)
    wheels = PACKED / "wheels"
    wheels.mkdir(parents=True)
    pinned = needed(options.python, {canonicalize_name(name) for name in options.without})
    _download(pinned, wheels, options.python)
    for wheel in wheels.glob("bitsandbytes-*.whl"):
        keep_libraries(wheel, [version.replace(".", "") for version in options.cuda])
    _pack_loss(PACKED / "start")
    tokenizer = SMOLLM2.load_tokenizer()
    tokenizer.save_pretrained(PACKED / "tokenizer")
    size = sum(file.stat().st_size for file in PACKED.rglob("*") if file.is_file())
    print(f"{len(pinned)} packages, {size / 2**20:.1f} MiB in {PACKED.relative_to(ROOT)}")


def needed(python: str, without: set[str]) -> dict[str, str]:
    """Return the versions of all that lit_ft and the tests depend on, keyed by name.

    Args:
        python: The version of Python on the machine with the GPU, such as "3.12".
        without: The normalised names of packages to leave out, with what they alone depend on.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    found: dict[str, str] = {}
    waiting = [Requirement(one) for one in (*project["dependencies"], *_FOR_TESTS)]
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        # torch's own requirements are not followed: they are where torch is.
        if name in found or name in without or name == "torch":
            continue
        if one.marker is not None and not one.marker.evaluate(environment):
            continue
        installed = distribution(name)
        found[name] = installed.version
        waiting += map(Requirement, installed.requires or ())
    return found


def _download(pinned: dict[str, str], folder: Path, python: str) -> None:
    pip = [sys.executable, "-m", "pip"]
    wheels = [f"{name}=={found}" for name, found in pinned.items() if name not in _SOURCES_ALONE]
    implementation = f"cp{python.replace('.', '')}"
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    for abi in (implementation, "abi3", "none"):
        target += ["--abi", abi]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC]
    for platform in (*platforms, "manylinux2014_x86_64", "manylinux1_x86_64"):
        target += ["--platform", platform]
    common = ["--quiet", "--no-deps"]
    subprocess.run([*pip, "download", *common, *target, "-d", str(folder), *wheels], check=True)
    sources = [f"{name}=={pinned[name]}" for name in _SOURCES_ALONE if name in pinned]
    subprocess.run([*pip, "wheel", *common, "-w", str(folder), *sources], check=True)


def keep_libraries(wheel: Path, versions: list[str]) -> None:
    """Leave out of bitsandbytes' wheel the libraries for other versions of CUDA and other GPUs.

    Args:
        wheel: The wheel, which is written again.
        versions: The versions of CUDA whose libraries stay, such as "130".
    """
    kept = {"cpu", *(f"cuda{version}" for version in versions)}
    smaller = wheel.with_suffix(".smaller")
    with (
        zipfile.ZipFile(wheel) as whole,
        zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as written,
    ):
        for entry in whole.infolist():
            library = re.search(r"/libbitsandbytes_(\w+)\.so$", entry.filename)
            if library is None or library[1] in kept:
                written.writestr(entry, whole.read(entry), zipfile.ZIP_DEFLATED)
    smaller.replace(wheel)


def _pack_loss(folder: Path) -> None:
    """Copy torch's chunked loss, and what gives it to an older torch; see `support.newer_loss`."""
    newer = folder / "newer_torch"
    newer.mkdir(parents=True)
    for module in (linear_cross_entropy, linear_cross_entropy_options):
        shutil.copy(inspect.getfile(module), newer)
    code = inspect.getsource(functional.linear_cross_entropy)
    (newer / "linear_cross_entropy.txt").write_text(code, encoding="utf-8")
    shutil.copy(Path(__file__).with_name("newer_loss.py"), folder / "sitecustomize.py")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/on_gpu.sh pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--python", default="3.12", help="the Python of the other machine")
    parser.add_argument(
        "--cuda",
        nargs="*",
        default=["12.8", "13.0"],
        help="the versions of CUDA that its torch may be built for",
    )
    parser.add_argument(
        "--without",
        nargs="*",
        default=_WITHOUT,
        help=f"packages to leave out (default: {' '.join(_WITHOUT)})",
    )
    return parser


if __name__ == "__main__":
    main()
