"""Run the steps of a Dockerfile in a root directory, for machines without a container engine:

    debootstrap --variant=minbase --include=python3.11,python3.11-venv,python3.11-dev bookworm ROOT
    python docker/in_root.py docker/Dockerfile.cpu ROOT [--mount FOLDER ...] [--then LINE]

Needs root. The directory replaces the base image (FROM is ignored). Supports RUN, COPY, ENV, ARG,
USER and WORKDIR, and refuses other instructions that change the image. Folders of this machine
that the steps need, such as an index of packages on disk, are mounted.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

STEP_SECONDS = 3600
# Instructions for containers of the image, not for the image.
LEFT_OUT = {"FROM", "ENTRYPOINT", "CMD", "LABEL", "EXPOSE"}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def instructions(text: str) -> list[tuple[str, str]]:
    """Word and rest of each instruction, without comments, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    pairs = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(word.upper(), rest.strip()) for word, _, rest in pairs]


@contextmanager
def mounted(root: Path, folders: list[str]) -> Iterator[None]:
    """Mount what every container has, and some folders of this machine, until the block ends."""
    with ExitStack() as stack:
        for folder in ("/proc", "/dev", "/sys", *folders):
            place = root / folder.lstrip("/")
            place.mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--rbind", folder, place], check=True)
            subprocess.run(["mount", "--make-rslave", place], check=True)
            stack.callback(subprocess.run, ["umount", "-R", "-l", place], check=True)
        for file in ("/etc/resolv.conf", "/etc/hosts"):
            shutil.copy(file, root / file.lstrip("/"))
        yield


class Image:
    """A root directory and the state that the instructions have set so far."""

    def __init__(self, root: Path, context: Path) -> None:
        self._root, self._context = root, context
        self._user, self._folder = "root", "/"
        # pip's own settings come from outside, as with `docker build --build-arg`.
        self._environment = {"PATH": PATH} | {
            name: value for name, value in os.environ.items() if name.startswith("PIP_")
        }

    def do(self, word: str, rest: str) -> None:
        """Follow one instruction.

        Raises:
            subprocess.CalledProcessError: a step failed.
        """
        if word == "RUN":
            self.run(rest)
        elif word == "COPY":
            self._copy(rest)
        elif word in ("ENV", "ARG"):
            for pair in shlex.split(rest):
                name, _, value = pair.partition("=")
                self._environment[name] = re.sub(r"\$(\w+)", self._known, value)
        elif word == "USER":
            self._user = rest
        elif word == "WORKDIR":
            self._folder = rest
            (self._root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif word not in LEFT_OUT:
            sys.exit(f"{word}: not known here")

    def run(self, line: str) -> None:
        """A line of shell inside, as the user and in the folder of now."""
        home = f"/home/{self._user}" if self._user != "root" else "/root"
        inside = f"cd {shlex.quote(self._folder)} && {line}"
        command = ["chroot", f"--userspec={self._user}", self._root, "/bin/sh", "-c", inside]
        environment = {**self._environment, "HOME": home}
        subprocess.run(command, env=environment, check=True, timeout=STEP_SECONDS)

    def _known(self, variable: re.Match[str]) -> str:
        return self._environment.get(variable[1], "")

    def _copy(self, rest: str) -> None:
        words = [word for word in shlex.split(rest) if not word.startswith("--chown=")]
        *sources, target = words
        place = self._root / self._folder.lstrip("/") / target
        for source in (self._context / name for name in sources):
            if source.is_dir():
                shutil.copytree(source, place, dirs_exist_ok=True)
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place / source.name)
        owner = next((w.split("=")[1] for w in shlex.split(rest) if w.startswith("--chown=")), None)
        if owner is not None:
            inside = f"/{place.relative_to(self._root)}"
            subprocess.run(["chroot", self._root, "chown", "-R", owner, inside], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("root", type=Path)
    parser.add_argument("--mount", nargs="*", default=[], help="folders of this machine")
    parser.add_argument("--then", help="a line of shell to run in the finished image")
    words = parser.parse_args()
    image = Image(words.root.resolve(), Path.cwd())
    with mounted(words.root.resolve(), words.mount):
        for word, rest in instructions(words.dockerfile.read_text()):
            print(f"== {word} {rest}"[:120], flush=True)
            image.do(word, rest)
        if words.then:
            image.run(words.then)


if __name__ == "__main__":
    main()
