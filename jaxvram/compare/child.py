"""A side of a comparison in a process of its own: a request goes in as JSON, an answer comes out as JSON."""

import json
import subprocess
import tempfile


class ChildError(Exception):
    """The process ended without an answer; the message is its own last word."""


def ask(command: list[str], request: dict, environment: dict, progress=lambda line: None) -> dict:
    """What the process answers.

    Args:
      request: its `way` begins the lines on stderr that tell how far it is.
      environment: all of it.
      progress: called with these lines.
    Raises:
      ChildError: it failed; said in the last line that it began with `error: `, or else in its last one.
      OSError: it does not start.
    """
    with tempfile.TemporaryFile("w+") as asked:  # not a pipe: one who ends without reading would break it
        json.dump(request, asked)
        asked.seek(0)
        process = subprocess.Popen(
            command, stdin=asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
    with process:
        said = []
        for line in process.stderr:  # the answer comes at the end, and is small: no pipe is filled meanwhile
            said.append(line.strip())
            if line.startswith(request["way"]):
                progress(line.strip())
        answer = process.stdout.read()
    if process.returncode:
        raise ChildError(_why(said, process.returncode))
    return json.loads(answer)


def last_word(said: list[str]) -> str:
    """The reason among the lines that a program wrote before it failed; empty: it wrote none."""
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    return errors[-1] if errors else next((line for line in reversed(said) if line), "")


def _why(said: list[str], status: int) -> str:
    if status < 0:
        return f"it was ended by signal {-status}" + (" (the machine's memory was full?)" if status == -9 else "")
    return last_word(said) or "it ended without a word"
