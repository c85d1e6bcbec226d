"""The names of all tasks, mixtures, objectives and metrics, collected from their tables.

Neither TensorFlow nor seqio is imported, so a typo in a name is reported at once.
"""
from types import MappingProxyType

from t5lab.data.objectives import table
from t5lab.data.tasks import embedded, paper_mixtures, papers
from t5lab.evaluation import metrics

OBJECTIVES = tuple(table.TABLE)
METRICS = tuple(metrics.FOR_FILES)

EMBEDDED = (*embedded.NAMES, embedded.MIXTURE)     # the package itself contains their data
TASKS = (*embedded.NAMES, *papers.NAMES, *papers.HUB)
NAMES = tuple(sorted({*TASKS, *paper_mixtures.MIXTURES, embedded.MIXTURE}))

# {task: its objective} of the tasks on unlabelled text; the other tasks are supervised.
OBJECTIVE_OF = MappingProxyType({
    **embedded.TEXT,
    **{name: row.objective for name, row in papers.TEXT.items()},
    **dict.fromkeys(papers.HUB, 'lm'),
})
