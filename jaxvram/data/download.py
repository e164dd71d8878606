"""Files from the network: resumed where they broke off, checked by sha256, under their own name only when whole."""

import contextlib
import hashlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from jaxvram.errors import UserError

TIMEOUT_S = 10  # without a byte for so long, a connection counts as dead
BLOCK = 1 << 20  # bytes
AGENT = {"User-Agent": "jaxvram"}


def cache_dir() -> Path:
    """$JAXVRAM_CACHE, else ~/.cache/jaxvram."""
    return Path(os.environ.get("JAXVRAM_CACHE") or Path.home() / ".cache" / "jaxvram").expanduser()


def fetch(url: str, dest: Path, sha256: str | None = None, is_whole: Callable[[Path], bool] | None = None) -> Path:
    """Download `url` to `dest` unless it is there. A broken download stays as dest.part, and the next call resumes it.

    One of two says whether it is right: its `sha256`, or, where nobody has published one, `is_whole` of the file.

    Raises UserError, which says what to do by hand: no network, a refusing server, a full disk, a wrong content.
    """
    if (sha256 is None) == (is_whole is None):
        raise ValueError("either sha256 or is_whole")
    if dest.exists():
        return dest
    by_hand = f"run again to resume, or get it by other means and save it as {dest}"
    with _explained(url, by_hand):
        dest.parent.mkdir(parents=True, exist_ok=True)
        with _lock(dest):
            part = dest.with_name(dest.name + ".part")
            resumed = part.exists()
            # a wrong checksum after a resume may be the old part's fault: once more, from the start
            is_right = lambda digest: digest.hexdigest() == sha256 if sha256 else is_whole(part)
            if not dest.exists() and not (_complete(url, part, is_right) or (resumed and _complete(url, part, is_right))):
                wrong = f"does not have the sha256 {sha256}" if sha256 else "sent something else than was asked for"
                raise UserError(f"{url} {wrong} and was thrown away; {by_hand}")
            if not dest.exists():  # else another process was faster
                os.replace(part, dest)
    return dest


def lfs_sha256(url: str) -> str:
    """The sha256 that a Hugging Face server states for a large file: guards against damage, not against the server."""
    with _explained(url, "try again later"):
        try:
            request = urllib.request.Request(url, headers=AGENT, method="HEAD")
            response = urllib.request.build_opener(_StayHere).open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code not in (301, 302, 303, 307, 308):
                raise
            response = error  # the redirect itself carries the header, the storage behind it does not
        with response:
            etag = (response.headers.get("X-Linked-Etag") or response.headers.get("ETag") or "").strip('W/"')
    if not re.fullmatch("[0-9a-f]{64}", etag):
        raise UserError(f"the server states no sha256 for {url}: is the address still right?")
    return etag


class _StayHere(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None


@contextlib.contextmanager
def _explained(url: str, by_hand: str):
    try:
        yield
    except (OSError, HTTPException) as error:  # URLError, time-outs and resets are OSErrors
        reason = getattr(error, "reason", None) or error.__class__.__name__ + (f": {error}" if str(error) else "")
        raise UserError(f"could not download {url} ({reason}); {by_hand}") from error


@contextlib.contextmanager
def _lock(dest: Path):
    """One process at a time downloads `dest`; the others wait. The lock dies with its process."""
    try:
        import fcntl
    except ImportError:  # not on Windows: there the checksum still catches two writers
        yield
        return
    with open(dest.with_name(dest.name + ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _complete(url: str, part: Path, is_right: Callable) -> bool:
    """Bring `part` to its full length. False, and `part` is gone, if its content is wrong then by `is_right(digest)`."""
    digest = hashlib.sha256()
    try:
        with open(part, "ab+") as file:
            file.seek(0)
            while block := file.read(BLOCK):
                digest.update(block)
            if not is_right(digest):  # right: an earlier run ended between the last byte and the rename
                digest = _append(url, file, digest)
    finally:
        if part.exists() and part.stat().st_size == 0:  # no network: nothing to resume
            part.unlink()
    if is_right(digest):
        return True
    part.unlink(missing_ok=True)
    return False


def _append(url: str, file, digest):
    """Append to `file` what it lacks of `url`; `digest` is of what it has. Returns the digest of the whole."""
    have = file.tell()
    request = urllib.request.Request(url, headers=AGENT | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # nothing lies beyond `have`: it was no part of this file
                return digest
            raise
    with response:
        if response.status != 206:  # the server sends all of it
            file.truncate(0)
            have, digest = 0, hashlib.sha256()
        rest = response.headers.get("Content-Length")
        total = have + int(rest) if rest else None
        name = url.rsplit("/", 1)[1]
        with tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name, disable=None) as bar:
            while block := response.read(BLOCK):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
        file.flush()
        if total is not None and file.tell() < total:
            raise ConnectionError(f"the connection broke at {file.tell():,} of {total:,} bytes")
    return digest
