"""Which runs are on one text, in whatever words it is asked for, and however much of it they take."""

import json
from collections.abc import Iterable

from pml.groups import DRAWN_SIZES
from pml.records import Record

__all__ = ["texts_of"]

# Settings that make the text of pml's own corpora. A seed that only orders pairs or holds some out is not one.
MADE = {
    "random_tokens": ("seed",),
    "phonebook": ("seed",),
    "biographies": ("seed",),
    "linear_rule": ("a", "b", "c"),
    "facts": (),
}
# Settings that make a text which is read.
READ = ("path", "dataset", "dataset_config", "split", "column", "target_column", "skip_tokens")
# Settings of every corpus that say how its text is asked for.
ASKED = ("chat_template", "system", "template_kwargs", "template_date")


def texts_of(records: Iterable[Record]) -> dict[str, str]:
    """The text of each corpus, by the hash of the corpus; corpora of one text are no independent evidence.

    Corpora drawn from one seed are one text, since larger ones begin with smaller ones; so are those cut from one file
    or dataset at one place. A text in which a share of the tokens is replaced at random is still that text, whatever
    the share and the seed: two shares of one seed differ in few tokens, and two seeds only in the replaced ones. If all
    tokens are replaced, the seed makes the text, unless another run mixes a text with the noise of that seed. This
    counts too few texts rather than too many, so that intervals are not too narrow.

    Where corpora differ although their settings are equal, because a file was edited between two runs or two folders
    have one of the same name, each corpus of that text is identified by its hash. Corpora of one's own are told apart
    by all settings but sizes and the format of the prompt, or by their file if they have a `path`.

    Args:
        records: All records that are looked at together.
    """
    known = list(records)
    mixed = {record.corpus_settings.get("seed"): _source(record) for record in known if 0 < _random_ratio(record) < 1}
    texts: dict[str, str] = {}
    corpora: dict[str, set[str]] = {}
    for record in known:
        text, seed = _source(record), record.corpus_settings.get("seed")
        if _random_ratio(record) == 1:
            text = mixed.get(seed, json.dumps(["noise", seed]))
        # One corpus is one text, even if records name it in two ways, such as by two paths.
        texts.setdefault(record.corpus_hash, text)
        # One text has other token ids with another tokenizer, and under other rules of encoding.
        made_with = [record.backbone_hash, record.corpus_encoding, record.corpus, record.corpus_settings]
        corpora.setdefault(repr(made_with), set()).add(record.corpus_hash)
    ambiguous = {texts[one] for several in corpora.values() if len(several) > 1 for one in several}
    return {one: one if text in ambiguous else text for one, text in texts.items()}


def _source(record: Record) -> str:
    """Equal for corpora that are made from one source, whatever they take of it."""
    settings = record.corpus_settings
    if record.corpus == "natural_text" or settings.get("path") or settings.get("dataset"):
        names = {*READ}
    else:
        names = {*MADE.get(record.corpus, settings.keys() - {*DRAWN_SIZES, *ASKED})}
        # Of several targets, only the first begins alike at all lengths.
        if settings.get("count", 1) != 1:
            names.add("length")
    made_by = {name: settings[name] for name in names & settings.keys()}
    return json.dumps([record.corpus, made_by], sort_keys=True, default=str)


def _random_ratio(record: Record) -> float:
    """Share of the target tokens of a text that are replaced at random; 0 for other corpora."""
    ratio = record.corpus_settings.get("random_ratio")
    return ratio if isinstance(ratio, int | float) else 0.0
