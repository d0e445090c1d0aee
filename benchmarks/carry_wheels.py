"""Downloads wheels for a machine with JAX and an accelerator, but no network.

    python benchmarks/carry_wheels.py wheels --python 3.12

downloads what `on_accelerator.py` needs there, for Linux on x86-64: the dependencies
in this project's `pyproject.toml`, and theirs in turn. What comes with JAX, or would be
too large, is left out.
"""

import argparse
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
# The optional dependencies that the tests and benchmarks there use.
WANTED = ("keras-hub", "hypothesis", "pytest", "pytest-xdist")
OF_JAX = {"jax", "jaxlib", "ml-dtypes", "numpy", "opt-einsum", "scipy"}
# keras-hub imports without TensorFlow, and without kagglehub if that isn't there at
# all; tokenizers needs the hub's client for downloads only.
LEFT_OUT = {"huggingface-hub", "kagglehub", "kagglesdk", "tensorflow-text"}
MOST_BYTES = 60_000_000
# pip must be told of older platforms, too: it takes no wheel of one that isn't named.
PLATFORMS = (
    "manylinux1_x86_64",
    "manylinux2010_x86_64",
    "manylinux2014_x86_64",
    *(f"manylinux_2_{minor}_x86_64" for minor in range(5, 29)),
)


def main():
    parser = argparse.ArgumentParser(description="Makes a folder of wheels.")
    parser.add_argument("folder", type=Path, help="where they go: new or empty")
    parser.add_argument("--python", default="3.12", help="whose version, such as 3.12")
    options = parser.parse_args()
    if options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"`folder` must be new or empty. Received: {options.folder}")
    download_all(project_requirements(), options.folder, options.python)
    check_size(options.folder)


def project_requirements():
    """The wanted requirements of `pyproject.toml`, a list of `Requirement`."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    needed = map(Requirement, project["dependencies"])
    extras = project["optional-dependencies"]
    optional = (Requirement(text) for name in ("hub", "test") for text in extras[name])
    return [*needed, *(each for each in optional if each.name in WANTED)]


def download_all(requirements, folder, python):
    """Downloads a wheel of each requirement and of what these require in turn."""
    seen = OF_JAX | LEFT_OUT
    while requirements := [each for each in requirements if name_of(each) not in seen]:
        seen = seen | {name_of(each) for each in requirements}
        download(requirements, folder, python)
        requirements = [
            needed for wheel in folder.glob("*.whl") for needed in needs(wheel, python)
        ]


def name_of(requirement):
    return canonicalize_name(requirement.name)


def download(requirements, folder, python):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation=cp"]
    command += [f"--python-version={python}", f"--dest={folder}"]
    command += [f"--platform={name}" for name in PLATFORMS]
    wanted = {f"{each.name}{each.specifier}" for each in requirements}
    subprocess.run([*command, *sorted(wanted)], check=True)


def needs(wheel, python):
    """The requirements of a wheel under that Python on Linux, without extras."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "extra": ""}
    for text in read_metadata(wheel).get_all("Requires-Dist", []):
        requirement = Requirement(text)
        if not requirement.marker or requirement.marker.evaluate(environment):
            yield requirement


def read_metadata(wheel):
    """The headers of a wheel's `METADATA`."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode("utf-8"))


def check_size(folder):
    """Ends with an error if the wheels together are too large to be carried."""
    sizes = {wheel.name: wheel.stat().st_size for wheel in folder.glob("*.whl")}
    total = sum(sizes.values())
    said = f"{len(sizes)} wheels, {total / 1e6:.1f} MB, in {folder}"
    if total > MOST_BYTES:
        largest = sorted(sizes.items(), key=lambda item: -item[1])
        listed = "\n".join(f"{size / 1e6:8.1f} MB  {name}" for name, size in largest)
        raise SystemExit(
            f"The wheels must take at most {MOST_BYTES / 1e6:.0f} MB. Received: "
            f"{said}\n{listed}"
        )
    print(said)


if __name__ == "__main__":
    main()
