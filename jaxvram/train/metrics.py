"""metrics.jsonl, the one record of a run, and its mirror in TensorBoard.

One JSON object a line: {"step": 10, "loss": 4.2, ...} for training, {"step": 10, "split": "val", "loss": 4.1} for an
evaluation. JSON has no NaN: a value that is not finite is written as null, and the key "nonfinite" says what it was
({"step": 11, "loss": null, "nonfinite": {"loss": "nan"}}); `read` puts the float back.
"""

import errno
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from jaxvram.errors import UserError

NAME = "metrics.jsonl"
MIRROR_SECONDS = 5.0  # between two visits of the TensorBoard thread
_JSON = json.JSONEncoder(allow_nan=False)  # made once: json.dumps with an option makes one a call


class MetricsLog:
    """Appends lines to workdir/metrics.jsonl, flushed one by one, and mirrors them to workdir/tensorboard.

    A kill -9 loses nothing that `write` returned from. On resume call `truncate_after(step of the checkpoint)`; so
    write every line of a step before its checkpoint is saved, evaluation included. With `active=False` (all processes
    but the first) nothing is written or read.
    """

    def __init__(self, workdir: str | os.PathLike, active: bool = True):
        self.path = Path(workdir) / NAME
        self._active = active
        if active:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._open()
            except OSError as error:
                raise _cannot_write(self.path, error) from error
            self._mirror = _TensorBoard(self.path.parent / "tensorboard")

    def write(self, step: int, values: Mapping, split: str | None = None) -> None:
        """One line; `values` are numbers, strings, lists, or arrays (of a finished step, or this waits for it)."""
        if not self._active:
            return
        line = {"step": int(step)} if split is None else {"step": int(step), "split": split}
        for name, value in values.items():
            line[name] = value if isinstance(value, float | int | str | list) else value.tolist()
        try:
            encoded = (_encode(line) + "\n").encode()
            if self._file.write(encoded) < len(encoded):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._mirror.add(line)

    def truncate_after(self, step: int) -> int:
        """Drop the lines of later steps, and damaged ones; returns how many.

        The file is replaced atomically, so a second kill leaves the old file or the new one. TensorBoard's own files
        only grow: a restart mark in them makes it hide what came after `step`.
        """
        if not self._active:
            return 0
        self._file.close()
        with open(self.path, encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
        kept = [line for line in lines if (parsed := _parse(line)) is not None and parsed["step"] <= step]
        if len(kept) < len(lines):
            write_atomic(self.path, "".join(kept))
            self._mirror.restart_at(step + 1)
        self._file = self._open()
        return len(lines) - len(kept)

    def flush(self) -> None:
        """Bring TensorBoard's files up to date too (call it before a checkpoint)."""
        if self._active:
            self._mirror.flush()

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        if self._active:
            self._active = False
            self._file.close()
            self._mirror.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def _open(self):
        """Open for appending, unbuffered; whatever stands after the last newline was cut short by a kill, and goes."""
        file = open(self.path, "ab+", buffering=0)  # noqa: SIM115
        size = start = file.tell()
        block = b""
        while start and b"\n" not in block:
            end, start = start, max(0, start - 4096)
            file.seek(start)
            block = file.read(end - start)
        whole = start + block.rfind(b"\n") + 1
        if whole < size:
            file.truncate(whole)
        return file


def read(workdir: str | os.PathLike) -> list[dict]:
    """All lines of workdir/metrics.jsonl ([] without a file), NaN and infinities restored, a half-written end ignored.

    UserError: a line in the middle is damaged.
    """
    path = Path(workdir) / NAME
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    parsed = [_parse(line) for line in lines]
    if parsed and not lines[-1].endswith("\n"):
        parsed.pop()
    if None in parsed:
        number = parsed.index(None) + 1
        raise UserError(f"{path}, line {number} is damaged: delete that line, or resume the run, which drops it")
    return parsed


def write_samples(workdir: str | os.PathLike, stem: str, files: Mapping[str, bytes]) -> list[Path]:
    """`files` (content by suffix) as samples/STEM.* in a run folder; their paths."""
    folder = Path(workdir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in files.items():
        write_atomic(folder / f"{stem}{suffix}", content)
    return [folder / f"{stem}{suffix}" for suffix in files]


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Replace `path` by `content` so that a reader, or the next start after a kill, finds the old file or the new one.

    UserError: the disk is full or the folder read-only.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def _encode(line: dict) -> str:
    try:
        return _JSON.encode(line)
    except ValueError:
        odd = {k: str(v) for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)}
        return json.dumps({k: None if k in odd else v for k, v in line.items()} | {"nonfinite": odd})


def _parse(line: str) -> dict | None:
    """The line as a dict, or None if it is not one of ours in full."""
    try:
        parsed = json.loads(line)
        odd = parsed.pop("nonfinite", {})
        return parsed | {name: float(text) for name, text in odd.items()} if isinstance(parsed["step"], int) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; put that right and run the same command again to resume")


class _TensorBoard:
    """Turns lines into TensorBoard events on a thread of its own.

    An event costs some 50 us (protobuf, and a checksum in Python) where a line of JSON costs ten, and tensorboardX's
    own SummaryWriter 100 us a scalar: so the training loop only appends to a queue. Nothing is imported or created
    before the first line is mirrored.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._pending: deque[tuple[float, dict, bool]] = deque()  # wall time, line, is it a restart mark
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = self._writer = self._error = None

    def add(self, line: dict) -> None:
        if self._error is not None:
            raise _cannot_write(self._folder, self._error)
        self._pending.append((time.time(), line, False))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tensorboard", daemon=True)
            self._thread.start()

    def restart_at(self, step: int) -> None:
        self._pending.append((time.time(), {"step": step}, True))

    def flush(self) -> None:
        self._drain()
        if self._error is not None:
            raise _cannot_write(self._folder, self._error)

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.flush()
        finally:
            if self._writer is not None:
                self._writer.close()

    def _run(self) -> None:
        while not self._stop.wait(MIRROR_SECONDS):
            self._drain()

    def _drain(self) -> None:
        with self._lock:
            try:
                while self._pending:
                    self._event_writer().write_event(_event(*self._pending.popleft()))
                    time.sleep(0)  # hand the interpreter back to the training loop between two events
                if self._writer is not None:
                    self._writer.flush()
            except OSError as error:
                self._error = error

    def _event_writer(self):
        if self._writer is None:
            from tensorboardX.event_file_writer import EventsWriter  # 1.5 s: kept out of the start

            self._folder.mkdir(parents=True, exist_ok=True)
            # Its file names carry whole seconds only, and it overwrites: two starts within one second must differ.
            self._writer = EventsWriter(str(self._folder / "events"), f".{os.getpid()}.{time.time_ns() % 10**9:09d}")
        return self._writer


def _event(wall_time: float, line: dict, restart: bool):
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    if restart:
        return Event(wall_time=wall_time, step=line["step"], session_log=SessionLog(status=SessionLog.START))
    split = {None: "train", "train": "train_eval"}.get(line.get("split"), line.get("split"))
    values = [
        Summary.Value(tag=f"{split}/{name}", simple_value=value)
        for name, value in line.items()
        if name != "step" and not isinstance(value, str | list)
    ]
    return Event(wall_time=wall_time, step=line["step"], summary=Summary(value=values))
