"""A launch as data: files to write and commands to run. --dry-run prints exactly what will run."""

from collections.abc import Mapping
import dataclasses
import shlex


@dataclasses.dataclass(frozen=True)
class LaunchStep:
  """A command.

  argv: {files} stands for the folder of the plan's files, in steps before `follow`.
  title: its purpose, in one line. until: the command is repeated every `every` seconds until it
  prints one of these. unless: if it prints one of these, the launch fails.
  """
  title: str
  argv: tuple[str, ...]
  until: tuple[str, ...] = ()
  unless: tuple[str, ...] = ()
  every: float = 10.

  def shell(self) -> str:
    command = shlex.join(self.argv)
    if not self.until:
      return f'# {self.title}\n{command}'
    success = '|'.join(map(shlex.quote, self.until))
    failure = f' {"|".join(map(shlex.quote, self.unless))}) exit 1;;' if self.unless else ''
    return (f'# {self.title}\nwhile :; do case "$({command})" in {success}) break;;{failure} esac; '
            f'sleep {self.every:g}; done')


@dataclasses.dataclass(frozen=True)
class Plan:
  """The steps of a launch, in order.

  The files are written; `prepare`, `create` and `start` run. If there is a `follow`, it shows the
  log until `state` and `codes` report the end of the job, and then `delete` runs.

  create: its first step fails if such a job exists already.
  prepare: runs before `create` and is not undone.
  states: an output of `state` -> 'running', 'ask' (only `codes` knows), 'done' or 'gone'
    (preempted); an output that is not listed means 'running'.
  codes: prints a line t5lab-exit=N for every process that has ended, and fails until all have.
  recreate: after preemption, everything is done again.
  bundle: {files}/bundle.tar.gz is the checkout.
  notes: lines to print first.
  """
  notes: tuple[str, ...]
  files: Mapping[str, str]
  create: tuple[LaunchStep, ...]
  prepare: tuple[LaunchStep, ...] = ()
  start: tuple[LaunchStep, ...] = ()
  follow: LaunchStep | None = None
  state: LaunchStep | None = None
  states: Mapping[str, str] = dataclasses.field(default_factory=dict)
  codes: LaunchStep | None = None
  delete: tuple[LaunchStep, ...] = ()
  recreate: bool = False
  bundle: bool = False

  def with_folder(self, files: str) -> 'Plan':
    """The same plan with the folder of its files in place of {files}."""
    def fill(steps):
      return tuple(dataclasses.replace(step, argv=tuple(
          argument.replace('{files}', files) for argument in step.argv)) for step in steps)
    return dataclasses.replace(self, prepare=fill(self.prepare), create=fill(self.create),
                               start=fill(self.start))

  def shell(self, files: str, archive: str = '', keep: bool = False) -> str:
    """The launch as a bash script with comments. archive: the command that makes the bundle."""
    plan = self.with_folder(files)
    lines = ['#!/bin/bash', *(f'# {note}' for note in self.notes), f'mkdir -p {shlex.quote(files)}']
    if self.bundle:
      lines.append(archive)
    for name, text in self.files.items():
      lines.append(f"cat > {shlex.quote(f'{files}/{name}')} <<'T5LAB_END'\n{text}T5LAB_END")
    lines += [step.shell() for step in (*plan.prepare, *plan.create, *plan.start)]
    if self.follow:
      lines += [self.follow.shell(),
                '# The launcher repeats the next two commands until all processes have ended, and '
                'shows the log meanwhile.', self.state.shell(), self.codes.shell()]
      if self.recreate:
        gone = ', '.join(state for state, meaning in self.states.items() if meaning == 'gone')
        lines.append(f'# If the state is {gone}: preempted; delete the machines and start over.')
    if not keep:
      lines += [step.shell() for step in self.delete]
    return '\n'.join(lines) + '\n'
