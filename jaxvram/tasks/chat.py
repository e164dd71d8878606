"""A conversation with a model that was taught to answer: lines in, answers out as they come."""

from collections.abc import Callable, Iterable

from jaxvram.data.tokenizers import continuation
from jaxvram.errors import UserError
from jaxvram.sample.stream import Stream, pieces_of_text

NEW = "/new"  # a line that begins another conversation


def chat(task, params, lines: Iterable[str], write: Callable[[str], None]) -> None:
    """Answers every line until there are no more; each answer knows what was said before, if the prompt style has turns.

    What was said first is forgotten where, with an answer, it would not fit the model's context.

    Args:
      task: a LanguageTask on instruction data, whose prompt style says how turns look.
      lines: what the user says, a message a line.
      write: called with pieces of text.
    Raises:
      UserError: the data knows no turns, or a message alone fills the model's context.
    """
    source = task.source
    if not hasattr(source, "prompt_ids"):
        raise UserError("sample.chat=True needs data.name=instructions, whose prompt style says how a conversation looks")
    stream, said, context = Stream(task.model, params, task.sample, source.vocab_size), [], task.model.context
    room = 0 if context is None else min(task.sample.max_new_tokens, context // 2)  # for an answer
    for line in lines:
        message = line.strip()
        if message == NEW:
            said = []
        if message in ("", NEW):
            continue
        ids_P, answer = source.prompt_ids(message, said), []
        while said and context is not None and len(ids_P) + room > context:
            said = said[1:]
            ids_P = source.prompt_ids(message, said)
        decode = lambda ids, ids_P=ids_P: continuation(source.tokenizer, ids_P, ids)
        for piece in pieces_of_text(stream.answer(ids_P, source.end_ids), decode):
            answer.append(piece)
            write(piece)
        write("\n")
        said.append((message, "".join(answer)))
