"Journals: damage that is found, writers that are killed, readers beside them"
import json, os, random, signal, time
import pytest
from learnkit.files.errors import DamagedError
from learnkit.files.journal import Journal, entries_of, entry_of, line_of, whole_lines


@pytest.fixture
def path(tmp_path):
    (tmp_path / 'studies').mkdir()
    return tmp_path / 'studies/s.journal'


def test_each_changed_byte_of_a_line_is_found():
    line, gen = line_of({'op_code': 8, 'user_attr': {'ids': ['ä.1', 2]}, 'x': None})[:-1], random
    assert entry_of(line) == {'op_code': 8, 'user_attr': {'ids': ['ä.1', 2]}, 'x': None}
    for place in range(len(line)):
        changed = bytearray(line)
        changed[place] ^= 1 << gen.randrange(7)
        with pytest.raises(ValueError, match='not as it was written'): entry_of(bytes(changed))
        with pytest.raises(ValueError, match='not as it was written'): entry_of(line[:place])


def test_lines_are_json_for_others(path):
    Journal(path).append_logs([{'op_code': 0, 'value': float('nan')}, {'op_code': 1}])
    assert [json.loads(line)['op_code'] for line in path.read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize('left', [b'{', b'{"op_code":4', b'\0' * 70_000, line_of({'a': 1})[:-1]],
                         ids=['brace', 'part', 'zeros', 'whole'])
def test_what_a_killed_writer_leaves_is_cut_off(path, left):
    journal = Journal(path)
    journal.append_logs([{'n': 0}, {'n': 1}])
    with open(path, 'ab') as file: file.write(left)
    assert journal.read_logs(2) == [] and Journal(path).read_logs(0) == [{'n': 0}, {'n': 1}]
    journal.append_logs([{'n': 2}])
    assert journal.read_logs(2) == [{'n': 2}] and len(Journal(path).read_logs(0)) == 3


def test_damage_in_the_middle_is_told_with_its_line(path):
    journal = Journal(path, 'Put back a copy')
    for n in range(5): journal.append_logs([{'n': n}])
    lines = whole_lines(path.read_bytes())
    lines[3] = lines[3].replace(b'"n":3', b'"n":8')
    path.write_bytes(b''.join(line + b'\n' for line in lines))
    assert entries_of(lines) == ([{'n': 0}, {'n': 1}, {'n': 2}], 4)
    with pytest.raises(DamagedError, match='line 4 is not as it was written. Put back a copy'):
        journal.read_logs(0)
    with pytest.raises(DamagedError, match='line 4 is not'): Journal(path).read_logs(2)


def test_killed_writers_lose_no_line_of_others(path):
    "All that an append has returned from is there, once and whole"
    def write(k):
        if pid := os.fork(): return pid
        try:
            journal, done = Journal(path), open(path.parent / f'done-{k}', 'a')
            for n in range(10**6):
                journal.append_logs([{'writer': k, 'n': n, 'text': 'x' * random.randrange(3000)}])
                done.write(f'{n}\n')
                done.flush()
        finally: os._exit(0)
    rng = random.Random(0)
    for k in range(0, 20, 2):
        pids = [write(k), write(k + 1)]
        time.sleep(0.02 + 0.1 * rng.random())
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    Journal(path).append_logs([{'writer': 'last'}])  # at once, as all others have ended
    entries = Journal(path).read_logs(0)
    assert entries[-1] == {'writer': 'last'} and path.read_bytes().endswith(b'\n')
    for k in range(20):
        file = path.parent / f'done-{k}'
        done = [int(n) for n in file.read_text().split()] if file.exists() else []
        mine = [each['n'] for each in entries if each['writer'] == k]
        assert mine in (done, [*done, len(done)])
