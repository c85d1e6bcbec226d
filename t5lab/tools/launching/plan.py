"""A launch as data: files to write, commands to run. Pure, so that --dry-run is the truth."""

from collections.abc import Mapping
import dataclasses
import shlex


@dataclasses.dataclass(frozen=True)
class Step:
  """say: what it is for, one line. until: it is run every `every` seconds until it prints one of
  these; `unless` it prints one of those, which fails. {files} in argv is the folder of files."""
  say: str
  argv: tuple[str, ...]
  until: tuple[str, ...] = ()
  unless: tuple[str, ...] = ()
  every: float = 10.

  def shell(self, files: str) -> str:
    command = shlex.join(fill(self.argv, files))
    if not self.until:
      return f'# {self.say}\n{command}'
    wanted = '|'.join(map(shlex.quote, self.until))
    failed = f' {"|".join(map(shlex.quote, self.unless))}) exit 1;;' if self.unless else ''
    return (f'# {self.say}\nwhile :; do case "$({command})" in {wanted}) break;;{failed} esac; '
            f'sleep {self.every:g}; done')


@dataclasses.dataclass(frozen=True)
class Plan:
  """What happens, in order: files are written, `prepare`, `create` and `start` run; then, where
  there is something to follow, `follow` shows the log until `state` and `codes` say that it has
  ended; then `delete`.

  states: what `state` prints -> 'running', 'ask' (only `codes` knows), 'done' or 'gone'
  (preempted: with `recreate`, all of it is done again); what is not in it is 'running'. `codes`
  prints a line t5lab-exit=N for every process that has ended, and fails until all have.
  notes: what the person should know.
  """
  notes: tuple[str, ...]
  files: Mapping[str, str]
  create: tuple[Step, ...]           # the first one fails if there is such a job already
  prepare: tuple[Step, ...] = ()     # before it, and not undone
  start: tuple[Step, ...] = ()
  follow: Step | None = None
  state: Step | None = None
  states: Mapping[str, str] = dataclasses.field(default_factory=dict)
  codes: Step | None = None
  delete: tuple[Step, ...] = ()
  recreate: bool = False
  bundle: bool = False               # {files}/bundle.tar.gz is the checkout

  def shell(self, files: str, archive: str = '', keep: bool = False) -> str:
    """All of it as a bash script, comments included. archive: the command that makes the bundle."""
    lines = ['#!/bin/bash', *(f'# {note}' for note in self.notes), f'mkdir -p {shlex.quote(files)}']
    if self.bundle:
      lines.append(archive)
    for name, text in self.files.items():
      lines.append(f"cat > {shlex.quote(f'{files}/{name}')} <<'T5LAB_END'\n{text}T5LAB_END")
    lines += [step.shell(files) for step in (*self.prepare, *self.create, *self.start)]
    if self.follow:
      lines.append(self.follow.shell(files))
      again = [f'{name} is {what}' for name, what in self.states.items() if what == 'gone']
      lines.append('# then, until it has ended (codes of all processes; else the log again)')
      lines += [step.shell(files) for step in (self.state, self.codes)]
      if self.recreate:
        lines.append(f'# preempted ({", ".join(again)}): delete, and all of this again')
    if not keep:
      lines += [step.shell(files) for step in self.delete]
    return '\n'.join(lines) + '\n'


def fill(argv, files: str) -> list[str]:
  return [a.replace('{files}', files) for a in argv]
