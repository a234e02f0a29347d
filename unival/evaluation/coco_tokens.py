"""The words of captions as the COCO evaluation counts them, and how its Java programs are run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

CONTRACTION = re.compile(r"(\w)(n't|'(?:s|re|ve|ll|d|m))\b")
TOKEN = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\d+(?:[.,]\d+)+|\w+(?:-\w+)*")

PTB_JAR = "stanford-corenlp-3.4.1.jar"
# What the COCO evaluation drops. Brackets are in capitals although the tokenizer writes them in
# small letters, so they stay in published scores; so they do here.
PTB_DROPPED = frozenset(
    ["'", "''", "`", "``", ".", "...", ",", ":", ";", "?", "!", "-", "--"]
    + [f"-{side}{kind}B-" for side in "LR" for kind in "RC"]
)
JAVA_SECONDS = 1800.0  # that a Java program may take; METEOR needs some ten to start


def tokenize(caption: str) -> str:
    """Lower-cased words separated by single spaces, in the manner of the Penn Treebank.

    Contractions are split (`don't` -> `do n't`), hyphenated words and numbers stay whole,
    punctuation and symbols are dropped. The published scores come from Stanford's Java tokenizer
    (`ptb_tokenize`), which differs in rare cases: brackets, abbreviations with dots, symbols such
    as `&`.
    """
    text = caption.lower().replace("\u2019", "'")
    return " ".join(TOKEN.findall(CONTRACTION.sub(r"\1 \2", text)))


def ptb_tokenize(captions: Sequence[str]) -> list[str]:
    """Captions as Stanford's Penn Treebank tokenizer of pycocoevalcap splits them.

    Lower-cased, without punctuation; one start of Java (half a second) for all of them.

    Raises:
        ImportError: pycocoevalcap is missing.
        JavaError: Java is missing or fails.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    # Whatever Python or Java takes for the end of a line would shift the captions after it.
    lines = [" ".join(caption.split()) for caption in captions]
    arguments = ["-cp", PTB_JAR, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines"]
    folder = Path(ptbtokenizer.__file__).parent
    with JavaProgram([*arguments, "-lowerCase"], folder) as tokenizer:
        found = tokenizer.finish("".join(f"{line}\n" for line in lines)).split("\n")[:-1]
        if len(found) != len(lines):
            raise JavaError(f"the tokenizer gave {len(found)} lines for {len(lines)} captions")
    return [" ".join(word for word in line.split() if word not in PTB_DROPPED) for line in found]


class JavaError(RuntimeError):
    """A Java program is missing, failed or took too long; the message says which."""


class JavaProgram:
    """A running Java program; it has ended when the `with` block has, whatever happened there.

    Its input and output are UTF-8. After JAVA_SECONDS it is killed, which ends what waits for it.

    Args:
        arguments: of the command `java`.
        folder: where it runs.

    Raises:
        JavaError: also for a pipe that breaks within the block.
    """

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        java = shutil.which("java")
        if java is None:
            raise JavaError("the command `java` was not found; install a Java runtime, 8 or newer")
        # A pipe that nobody reads would stop the program when it is full.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [java, "-Dfile.encoding=UTF-8", *arguments],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,  # `java` may be a script that starts the real one
            )
        except OSError as error:
            self._errors.close()
            raise JavaError(f"{java} cannot be run: {error}") from error
        self._seconds = JAVA_SECONDS
        self._late = False
        self._timer = threading.Timer(self._seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> JavaProgram:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what is left to write has no reader any more
                pipe.close()
        reason = self._reason()
        self._errors.close()
        if isinstance(error, OSError):
            raise JavaError(reason) from error

    def ask(self, line: str) -> str:
        """Write a line and read one."""
        self._process.stdin.write(f"{line}\n".encode("utf-8", "replace"))
        self._process.stdin.flush()
        return self.read_line()

    def read_line(self) -> str:
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            self._process.wait()
            raise JavaError(self._reason())
        return line.decode("utf-8", "replace").strip()

    def finish(self, text: str = "") -> str:
        """Write a text and read all that the program writes until it ends."""
        found, _ = self._process.communicate(text.encode("utf-8", "replace"))
        if self._process.returncode != 0:
            raise JavaError(self._reason())
        return found.decode("utf-8", "replace")

    def _expire(self) -> None:
        self._late = True
        self._kill()

    def _kill(self) -> None:
        """Ends the program and what it started, unless it was waited for: then its id is free."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _reason(self) -> str:
        """Why the program, which has ended, did not do its work."""
        if self._late:
            return f"java was stopped after {self._seconds:g} seconds"
        self._errors.seek(0)
        said = self._errors.read(1 << 16).decode("utf-8", "replace").split("\n")
        places = ("at ", "...")  # of a stack trace
        lines = [line.strip() for line in said if not line.strip().startswith(places)]
        last = next((line for line in reversed(lines) if line), "no message")
        return f"java ended with status {self._process.returncode}: {last[:300]}"
