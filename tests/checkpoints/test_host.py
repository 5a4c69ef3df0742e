"What a record knows of its object lies in a host, not in the object's class"
import ast, inspect
from pathlib import Path
import pytest
from checkpoint_runs import digest, make, script
from counting import Fits
from learnkit import Checkpointed, CheckpointedLearner
from learnkit.checkpoints.host import Display, Files, Host, Reach, Rules
from learnkit.checkpoints.learner_display import LearnerDisplay
from learnkit.checkpoints.learner_files import LearnerFiles
from learnkit.checkpoints.learner_host import LearnerHost
from learnkit.checkpoints.learner_reach import LearnerReach
from learnkit.checkpoints.learner_rules import LearnerRules
import learnkit

PACKAGE = Path(learnkit.__file__).parent
ROOMS = ['results', 'record', 'host', 'direct_calls', 'shared_store', 'digests', 'ledger',
         'changes', 'answers', 'block', 'checkpointed']


def imported(name): # set of module names
    "The modules of the package that a module imports anywhere"
    path, found = PACKAGE.joinpath(*name.split('.')).with_suffix('.py'), set()
    package = name.split('.')[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(node, ast.ImportFrom): continue
        if node.level: base = package[:len(package) - node.level + 1]
        elif node.module.partition('.')[0] == 'learnkit': base = []
        else: continue
        found.add('.'.join([*base, *(node.module or '').removeprefix('learnkit.').split('.')]))
    return found


def reached(name): # set of module names
    "The modules that a module imports, directly or through others"
    found, todo = set(), [name]
    while todo:
        new = imported(todo.pop()) - found
        found |= new
        todo += sorted(new)
    return found


@pytest.mark.parametrize('room', ROOMS)
def test_the_record_knows_no_learner(room):
    floors = {name.partition('.')[0] for name in reached(f'checkpoints.{room}')}
    assert not floors & {'loop', 'training', 'processes'}
    of_learners = {f'checkpoints.{path.stem}' for path in PACKAGE.glob('checkpoints/learner*.py')}
    assert of_learners and not of_learners & reached(f'checkpoints.{room}')


def test_the_walk_sees_learners_where_they_are():
    assert {'loop.learner', 'loop.loop', 'training.save_best'} <= reached('checkpoints.learner')


PARTS = {Display: LearnerDisplay, Reach: LearnerReach, Files: LearnerFiles, Rules: LearnerRules}
KINDS = {Host: LearnerHost, **PARTS}


def declared(cls): return {name for name in vars(cls) if name[0] != '_'} # set of names


@pytest.mark.parametrize(('cls', 'most'), [(Host, 15), *((part, 9) for part in PARTS)])
def test_the_protocol_is_small(cls, most):
    assert len([name for name in declared(cls) if inspect.isfunction(vars(cls)[name])]) <= most


@pytest.mark.parametrize('cls', KINDS)
def test_learners_answer_the_protocol_and_nothing_else(cls):
    assert KINDS[cls].__bases__ == (cls,) and declared(KINDS[cls]) <= declared(cls)


DECLARED = {name for pair in KINDS.items() for cls in pair for name in declared(cls)}
OTHER = '''object construction display reach files rules guards host block position ancestors
    drifts unseeded laid trained once of_the_model of_training captured at line seen outside hosts
    _lay _root _beside _capture _live_state _structure _reads _best _kept _attributes _carriers
    _mark _report _fetched _say _is_busy _ranks'''.split()
NAMES = sorted({*DECLARED, *OTHER} - set(dir(CheckpointedLearner)))


def test_a_users_class_may_use_any_name(tmp_path):
    first = digest(script(make(tmp_path / 'plain')))
    def __init__(self, *args, **kwargs):
        super(Named, self).__init__(*args, **kwargs)
        vars(self).update({name: True for name in NAMES if name[0] != '_'})
    body = {**dict.fromkeys(NAMES, True), '__init__': __init__}
    Named = type('Named', (CheckpointedLearner,), body)
    assert digest(script(make(tmp_path, cls=Named))) == first
    Fits.n = 0
    assert digest(script(make(tmp_path, cls=Named))) == first and Fits.n == 0


def test_checkpointed_adds_one_attribute(tmp_path):
    class Plain:
        def __init__(self): self.value = 0
    class Recorded(Checkpointed, Plain): pass
    assert vars(Recorded(name='run', root=tmp_path)).keys() == {'value', 'ledger'}
    assert [name for name in vars(Checkpointed) if name[0] == '_' and name[:2] != '__'] == []


def test_the_name_of_the_ledger_is_taken():
    with pytest.raises(TypeError, match="Own uses 'ledger'"):
        class Own(Checkpointed): ledger = 3
    with pytest.raises(TypeError, match="Beside uses 'ledger'"):
        class Beside:
            def open(self): self.ledger = []
        class Both(Checkpointed, Beside): pass


def test_a_constructor_that_forgets_the_others():
    class Own(Checkpointed):
        def __init__(self): self.value = 1
    with pytest.raises(TypeError, match='super'): Own()
