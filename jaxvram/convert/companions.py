"""What stands beside weights and is not ours to know: tokenizer files, and which tokens begin and end a text."""

import json
import pathlib
import shutil

from jaxvram.convert.gguf import special_ids
from jaxvram.convert.huggingface import COMPANIONS, CONFIG
from jaxvram.errors import UserError

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def add(folder, base) -> list[str]:
    """Gives an export the companions of the weights that the run began from; the names of the files that were copied.

    Without the ids `generate` of transformers would not stop where the model has learnt to.

    Args:
      folder: an export of ours.
      base: a folder in Hugging Face's layout; a .gguf file, of which only the ids can be taken; or a .pth, which has none.
    Raises:
      UserError: a file can't be read or written.
    """
    folder, base = (pathlib.Path(path).expanduser() for path in (folder, base))
    if base.suffix == ".pth":
        return []
    try:
        copied = [] if base.is_file() else [name for name in COMPANIONS if (base / name).is_file()]
        for name in copied:
            shutil.copyfile(base / name, folder / name)
        ids = special_ids(base) if base.is_file() else json.loads((base / CONFIG).read_text(encoding="utf-8"))
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config |= {name: ids[name] for name in IDS if ids.get(name) is not None}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot copy tokenizer files of {base} to {folder}: {error}") from error
    return copied
