"""Lets the runs of one process share their traced and compiled programs."""

import contextlib
import dataclasses
import json

import pytest

from t5lab import config
from t5lab.programs import build, lab, scoring, shapes

# The sections that a train step and the programs of an evaluation are made of; a batch is known by
# its shapes. Whatever is read from files comes from the run's own config.
SECTIONS = ('model', 'optim', 'loss', 'lora', 'mesh', 'rules', 'guard', 'seed', 'total_steps')


def _key(c, *more):
  sections = {name: value for name, value in config.to_dict(c).items() if name in SECTIONS}
  rows = {name: str(x) for name, x in shapes.batch_shapes(c).items()}
  return json.dumps([sections, c.data.batch_size, rows, *more], sort_keys=True)


@contextlib.contextmanager
def shared():
  """Inside the block, configs with equal programs get the same jitted functions."""
  programs, engines, eval_steps = {}, {}, {}
  make_program, make_engine = build.program, lab.make_engine
  make_evaluator = scoring.Evaluator.__init__

  def program(c, devices=None):
    key = _key(c, str(devices))
    if key not in programs:
      programs[key] = make_program(c, devices)
    return dataclasses.replace(programs[key], config=c)

  def engine(c):
    key = _key(c, c.eval.batch_size, c.data.vocab)
    if key not in engines:
      engines[key] = make_engine(c)
    return engines[key]

  def evaluator(self, c, *args):
    make_evaluator(self, c, *args)
    self._eval_step = eval_steps.setdefault(_key(c), self._eval_step)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build, 'program', program)
    for module in (lab, scoring):
      patch.setattr(module, 'make_engine', engine)
    patch.setattr(scoring.Evaluator, '__init__', evaluator)
    yield
