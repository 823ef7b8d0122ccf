"""Run the loss tasks: loss by position, and loss on a final block as its context grows, on real documents."""

import contextlib
import hashlib
import json
import math
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from inplace_ttt.config import UserError
from inplace_ttt.data.position import PositionRanges
from inplace_ttt.environment import World
from inplace_ttt.evaluation import documents
from inplace_ttt.evaluation.arguments import Arguments
from inplace_ttt.evaluation.checkpoint_reader import CheckpointReader, ScoredDocument, evaluation_config
from inplace_ttt.evaluation.columns import EvaluatedModel, one_tokenizer
from inplace_ttt.evaluation.documents import Chosen, Document, Selection
from inplace_ttt.evaluation.kinds import KINDS
from inplace_ttt.evaluation.losses import sums_of
from inplace_ttt.evaluation.models import open_model
from inplace_ttt.evaluation.results import Results
from inplace_ttt.evaluation.scores import Scores
from inplace_ttt.evaluation.work_queue import ProgressMeter, WorkQueue, interrupted, say_done, say_speed
from inplace_ttt.job import SLOW_PHASE_FACTOR, Job

NO_COMPARISON = "their losses per token are not comparable; evaluate them one at a time"


class ReadingTask:
    """Run ``position`` or ``final-block``: measure the loss of each model on the same documents."""

    takes_layouts = True

    def __init__(self, arguments: Arguments, asked: list[EvaluatedModel], world: World):
        """Check the options and choose the documents.

        Raises UserError if the options do not fit the models, the models have different tokenizers, or no document is
        long enough.
        """
        self.arguments, self.asked, self.task, self.notes = arguments, asked, arguments.task, []
        paths = {one.model.path for one in asked if one.model.checkpoint}
        self.configs = {path: evaluation_config(path, arguments.overrides, world.size) for path in paths}
        one_tokenizer(asked, NO_COMPARISON)
        for one in asked:
            if one.model.path in self.configs:
                one.mode.check_rule(self.configs[one.model.path].ttt, one.model.path)
        trained = next((one.model.longest() for one in asked if one.model.longest()), 0)
        make = self._positions if self.task == "position" else self._blocks
        self.readings, self.contexts, self.settings = make(arguments.options, trained)
        self.digests = [_digest(reading) for reading in self.readings]
        self.longest = max(len(one.document.tokens) - 1 for one in self.readings)

    def _positions(self, options, trained: int) -> tuple[list[ScoredDocument], list[int], dict]:
        length = options.length or trained
        if not length:
            raise UserError(f"the training length of '{self.asked[0].model.path}' is unknown: set --length")
        edges = options.ranges or self.arguments.overrides.get("train.eval_positions")
        if edges is not None and (len(edges) < 2 or edges[0] >= length):
            raise UserError(
                f"--ranges {','.join(map(str, edges))}: use at least two edges, the first below --length {length}"
            )
        ranges = PositionRanges.equal(length)
        if edges:  # cut at the length that is read
            ranges = PositionRanges((*(edge for edge in edges if edge < length), min(edges[-1], length)))
        chosen = self._documents(Selection(length, options.min_length or length, options.samples, options.seed))
        settings = self._settings(chosen, length) | dict(ranges=list(ranges.edges))
        return [ScoredDocument(one, ranges) for one in chosen.documents], [0] * len(chosen.documents), settings

    def _blocks(self, options, trained: int) -> tuple[list[ScoredDocument], list[int], dict]:
        contexts, block = _contexts(options, trained, self.asked)
        length = contexts[-1] + block
        chosen = self._documents(Selection(length, length, options.samples, options.seed))
        readings, each = [], []
        for context in contexts:
            start, ranges = length - block - context, PositionRanges((context, context + block))
            for one in chosen.documents:
                counts = None if one.counts is None else one.counts[start:length]
                readings.append(ScoredDocument(Document(one.tokens[start : length + 1], counts), ranges))
                each.append(context)
        return readings, each, self._settings(chosen, length) | dict(contexts=contexts, block=block)

    def _settings(self, chosen: Chosen, length: int) -> dict:
        seed = self.arguments.options.seed
        trained = max((one.model.longest() for one in self.asked), default=0)
        if trained and length > trained:
            self.notes.append(f"{length} tokens exceed the model's training length of {trained}")
        asked_for = self.arguments.options.samples
        if len(chosen.documents) < asked_for:
            self.notes.append(f"only {len(chosen.documents)} documents of --samples {asked_for} are long enough")
        return dict(documents=chosen.source, count=len(chosen.documents), length=length, seed=seed)

    def _documents(self, selection: Selection) -> Chosen:
        chosen = _find_documents(self.arguments.options, self.asked, selection)
        _check_vocabulary(chosen, self.asked)
        self.notes += chosen.notes
        unique = {one.digest: one for one in chosen.documents}
        if len(unique) < len(chosen.documents):
            self.notes.append(f"{len(chosen.documents) - len(unique)} duplicate documents are read once")
        return replace(chosen, documents=list(unique.values()))

    def prepare(self, job: Job) -> None:
        """Print the notes about the documents, on rank 0. The documents were chosen at construction."""
        if job.world.rank == 0:
            for note in self.notes:
                print(f"note: {note}", flush=True)

    def run(self, results: Results, job: Job, device: torch.device, dtype: torch.dtype) -> None:
        """Measure the samples that ``results`` does not have yet. All ranks must call it."""
        reader, read = None, None
        for number, one in enumerate(self.asked):
            left = [
                i
                for i, digest in enumerate(self.digests)
                if (one.column.digest, self.task, digest) not in results.known
            ]
            if not left:
                if job.world.rank == 0:
                    say_done(f"{self.task} of {one.column.label}", len(self.digests))
                continue
            left.sort(key=lambda i: -len(self.readings[i].document.tokens))
            name = f"{self.task} of {one.column.label}"
            if one.model.checkpoint is None:
                self._read_folder(one, name, left, results, job, device, dtype, number)
                continue
            if read != one.model.path:
                if reader is not None:
                    reader.close()
                config = self.configs[one.model.path]
                reader, read = CheckpointReader(one.model.path, config, job, self.longest), one.model.path
            self._read_checkpoint(one, name, left, results, job, reader)

    def _read_folder(self, one: EvaluatedModel, name: str, left: list[int], results: Results, job: Job,
                     device: torch.device, dtype: torch.dtype, number: int) -> None:  # fmt: skip
        """Measure documents with one model replica per rank; the ranks share the documents."""
        costs = [float(len(self.readings[i].document.tokens)) for i in left]
        model, done = None, len(self.readings) - len(left)
        for piece in WorkQueue(job, name, costs, [1] * len(left), done, key=str(number)):
            if model is None:
                model = open_model(one.model.path, one.column.label, one.mode, device, dtype)
            reading = self.readings[left[piece]]
            results.add(self._record(one, left[piece], sums_of(model, reading.document, reading.ranges)))

    def _read_checkpoint(self, one: EvaluatedModel, name: str, left: list[int], results: Results, job: Job,
                         reader: CheckpointReader) -> None:  # fmt: skip
        """Measure documents with one model over all ranks, ``reader.at_once`` documents per step."""
        total, done, spent = len(self.readings), len(self.readings) - len(left), 0
        costs = [len(self.readings[i].document.tokens) for i in left]
        asked_to_stop, started = torch.zeros(1, device=reader.device), time.monotonic()
        with contextlib.ExitStack() as stack:
            meter = (
                stack.enter_context(contextlib.closing(ProgressMeter(name, total, done)))
                if job.world.rank == 0
                else None
            )
            for first in range(0, len(left), reader.at_once):
                job.watchdog.set_phase(f"{name}, document {first + 1} of {len(left)}", SLOW_PHASE_FACTOR)
                group = left[first : first + reader.at_once]
                found = reader.read([self.readings[i] for i in group], one.mode)
                done, spent = done + len(group), spent + sum(costs[first : first + reader.at_once])
                records = [self._record(one, i, sums) for i, sums in zip(group, found, strict=True)]
                if meter is not None:
                    for record in records:
                        results.add(record)
                    meter.show(done, spent / sum(costs))
                asked_to_stop.fill_(float(job.stop.received is not None))
                dist.all_reduce(asked_to_stop, op=dist.ReduceOp.MAX)
                if asked_to_stop.item() and done < total:
                    raise interrupted(name, done, total)
        if job.world.rank == 0:
            say_speed(name, len(left), sum(costs), time.monotonic() - started)

    def _record(self, one: EvaluatedModel, i: int, sums: list[list[float]]) -> dict:
        """Return the record of a sample. Raises UserError if a loss is not finite."""
        if not all(math.isfinite(loss) for loss, _ in sums):
            raise UserError(
                f"the losses of '{one.column.label}' are not finite: its weights may contain NaN; export it again"
            )
        return dict(
            model=one.column.label,
            model_digest=one.column.digest,
            task=self.task,
            sample=self.digests[i],
            index=i,
            context=self.contexts[i],
            ranges=self.readings[i].ranges.records(sums),
        )

    def scores(self, results: Results) -> list[Scores]:
        """Return one table: the loss per position range, or per context length."""
        by_model = {
            one.column.label: [results.use((one.column.digest, self.task, digest)) for digest in self.digests]
            for one in self.asked
        }
        return [KINDS[self.arguments.task].table(by_model, self.settings)]


def _contexts(options, trained: int, asked: list[EvaluatedModel]) -> tuple[list[int], int]:
    """Return the context lengths and the block length, in tokens.

    Defaults follow from the training length: a block of an eighth, contexts that double up to the rest. Raises
    UserError if an option is invalid or the training length is not known.
    """
    if options.contexts:
        if options.contexts[0] < 1:
            raise UserError("--contexts 0: the first token of a block needs a token before it; use 1 or more")
        return options.contexts, options.block or max(1, options.contexts[-1] // 8)
    if not trained:
        raise UserError(f"the training length of '{asked[0].model.path}' is unknown: set --contexts")
    block = options.block or max(1, trained // 8)
    if block >= trained:
        raise UserError(
            f"--block {block} leaves no context within the training length of {trained} tokens: set --contexts, or a "
            f"smaller --block"
        )
    contexts = [trained - block]
    while contexts[0] >= 2 * block:
        contexts.insert(0, contexts[0] // 2)
    return contexts, block


def _find_documents(options, asked: list[EvaluatedModel], selection: Selection) -> Chosen:
    if options.documents is None:
        run = next((one.model.checkpoint for one in asked if one.model.checkpoint and one.model.checkpoint.run), None)
        if run is None:
            raise UserError("no model is a run with held-out documents: set --documents, or name a run")
        return documents.held_out(run.config, run.run, selection)
    prepared = [name for name in options.documents if documents.is_corpus(name)]
    if not prepared:
        return documents.of_files(options.documents, selection, asked[0].model.tokenizer(), options.text_key)
    if len(options.documents) > 1:
        raise UserError(f"--documents {','.join(options.documents)}: use one prepared corpus, or text files only")
    return documents.of_corpus(prepared[0], selection)


def _check_vocabulary(chosen: Chosen, asked: list[EvaluatedModel]) -> None:
    """Raise UserError if the documents were tokenized with a different tokenizer than a model's."""
    largest = max(int(one.tokens.max()) for one in chosen.documents)
    for model in {one.model.path: one.model for one in asked}.values():
        size = model.vocabulary()
        other = None
        if chosen.tokenizer is not None and (mark := model.fingerprint()) is not None and mark != chosen.tokenizer:
            other = "were made with another tokenizer than"
        if largest >= size:
            other = f"contain token ID {largest}, which is outside the vocabulary of {size} tokens of"
        if other:
            raise UserError(
                f"the {chosen.source} {other} '{model.path}': set --documents to a corpus of the model's tokenizer, or "
                f"to text files"
            )


def _digest(reading: ScoredDocument) -> str:
    """Return a hash of the tokens, the position ranges and the scored positions."""
    counts = reading.document.counts
    facts = [reading.document.digest, list(reading.ranges.edges), None if counts is None else counts.tolist()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
