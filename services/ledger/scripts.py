"""Every key and every script of the ledger in Redis. Nobody else names a key.

All keys share the hash tag `{lemix}`, so that a script's keys live in one slot. Scripts keep to the command set of
Redis 6.2 and get every key through KEYS. `op` is a number made once per call: a script that ran although its reply was
lost recognises its own retry by it.
"""

from typing import Final

_PREFIX: Final = "{lemix}:"

#: Consumer groups.
GLOBAL_GROUP: Final = "scheduler"
NODE_GROUP: Final = "node"

#: Newest fencing token. No TTL: it must never fall.
TOKEN: Final = _PREFIX + "token"
#: Stream of accepted tasks without a node. No TTL: accepted work.
GLOBAL: Final = _PREFIX + "global"
#: Set of nodes that got work since they were last taken back. No TTL: one short member per node.
NODES: Final = _PREFIX + "nodes"
#: Sorted set of job ids by creation. No TTL: members go when their job has expired.
JOBS: Final = _PREFIX + "jobs"


def node_key(node_id: str) -> str:
    """Stream of a node's unfinished tasks. No TTL: accepted work; empty streams are one per node id."""
    return f"{_PREFIX}node:{node_id}"


def task_key(task_id: str) -> str:
    """Hash of a task: state, node, entry, outcome, op, again ("1": it may be submitted anew).

    TTL: none while unfinished, the result TTL when done.
    """
    return f"{_PREFIX}task:{task_id}"


def file_key(file_id: str) -> str:
    """Hash of a file: record, op. TTL: retention, anew whenever the file is written or read."""
    return f"{_PREFIX}file:{file_id}"


def examples_key(file_id: str) -> str:
    """Hash of a file's examples by position. TTL as its file."""
    return f"{_PREFIX}examples:{file_id}"


def feedback_key(file_id: str, request_id: str) -> str:
    """Position that a request's example got. TTL: retention; without a request id as long as a call may retry."""
    return f"{_PREFIX}feedback:{file_id}:{request_id}"


def job_key(job_id: str) -> str:
    """A job's record. TTL: none until the job has ended, then retention."""
    return f"{_PREFIX}job:{job_id}"


def job_request_key(request_id: str) -> str:
    """Id of the job that a request made. TTL as its job."""
    return f"{_PREFIX}job-request:{request_id}"


def job_events_key(job_id: str) -> str:
    """List of a job's newest events. TTL: retention, anew with every event."""
    return f"{_PREFIX}job-events:{job_id}"


#: KEYS task, global; ARGV item, op. Nil: accepted now; else state, node, outcome.
SUBMIT: Final = """
local known = redis.call('HMGET', KEYS[1], 'state', 'node', 'outcome', 'op', 'again')
if known[1] then
  if known[4] == ARGV[2] then return false end
  if known[5] ~= '1' then return {known[1], known[2], known[3]} end
  redis.call('DEL', KEYS[1])
end
local entry = redis.call('XADD', KEYS[2], '*', 'item', ARGV[1])
redis.call('HSET', KEYS[1], 'state', 'waiting', 'node', '', 'entry', entry, 'op', ARGV[2])
return false
"""

#: KEYS token, task, global, node stream, nodes; ARGV token, item, node, entry, group. -1 stale, 0 refused, 1 moved.
ASSIGN: Final = """
if tonumber(ARGV[1]) < tonumber(redis.call('GET', KEYS[1]) or '0') then return -1 end
local known = redis.call('HMGET', KEYS[2], 'state', 'node', 'entry')
if known[1] == 'done' then return 0 end
if known[1] == 'assigned' then
  if known[2] == ARGV[3] then return 1 end
  return 0
end
for _, entry in ipairs({known[3] or '', ARGV[4]}) do
  if entry ~= '' then
    redis.call('XACK', KEYS[3], ARGV[5], entry)
    redis.call('XDEL', KEYS[3], entry)
  end
end
local entry = redis.call('XADD', KEYS[4], '*', 'item', ARGV[2])
redis.call('HSET', KEYS[2], 'state', 'assigned', 'node', ARGV[3], 'entry', entry)
redis.call('SADD', KEYS[5], ARGV[3])
return 1
"""

#: KEYS task, global; ARGV outcome, result TTL in ms (0: forget the task), entry, group, whether it may come again.
CLOSE: Final = """
local known = redis.call('HMGET', KEYS[1], 'state', 'entry')
if known[1] == 'assigned' then return 0 end
local last = ''
if known[1] == 'waiting' then last = known[2] end
for _, entry in ipairs({last, ARGV[3]}) do
  if entry ~= '' then
    redis.call('XACK', KEYS[2], ARGV[4], entry)
    redis.call('XDEL', KEYS[2], entry)
  end
end
if known[1] == 'done' then return 0 end
if ARGV[2] == '0' then return redis.call('DEL', KEYS[1]) end
redis.call('HSET', KEYS[1], 'state', 'done', 'node', '', 'outcome', ARGV[1], 'again', ARGV[5])
redis.call('HDEL', KEYS[1], 'entry')
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""

#: KEYS token, node stream, global, nodes, tasks...; ARGV token, node, group, op, entries... (as many as tasks).
#: -1 stale, else the positions (from 1) of the tasks that wait again.
TAKE_BACK: Final = """
if tonumber(ARGV[1]) < tonumber(redis.call('GET', KEYS[1]) or '0') then return -1 end
local moved = {}
for i = 1, #KEYS - 4 do
  local task, entry = KEYS[4 + i], ARGV[4 + i]
  local known = redis.call('HMGET', task, 'state', 'node', 'entry', 'op')
  local rows = redis.call('XRANGE', KEYS[2], entry, entry)
  redis.call('XACK', KEYS[2], ARGV[3], entry)
  redis.call('XDEL', KEYS[2], entry)
  if rows[1] and known[1] == 'assigned' and known[2] == ARGV[2] and known[3] == entry then
    local again = redis.call('XADD', KEYS[3], '*', 'item', rows[1][2][2])
    redis.call('HSET', task, 'state', 'waiting', 'node', '', 'entry', again, 'op', ARGV[4])
    moved[#moved + 1] = i
  elseif known[1] == 'waiting' and known[4] == ARGV[4] then
    moved[#moved + 1] = i
  end
end
if redis.call('XLEN', KEYS[2]) == 0 then redis.call('SREM', KEYS[4], ARGV[2]) end
return moved
"""

#: KEYS task, node stream; ARGV node, entry, outcome, result TTL in ms, op, group, whether it may come again.
#: 1: this call ended the task.
#: A refused entry is removed: whoever holds the task has an entry of its own.
FINISH: Final = """
local known = redis.call('HMGET', KEYS[1], 'state', 'node', 'entry', 'op')
redis.call('XACK', KEYS[2], ARGV[6], ARGV[2])
redis.call('XDEL', KEYS[2], ARGV[2])
if known[1] == 'done' and known[4] == ARGV[5] then return 1 end
if known[1] ~= 'assigned' or known[2] ~= ARGV[1] or known[3] ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'state', 'done', 'outcome', ARGV[3], 'op', ARGV[5], 'again', ARGV[7])
redis.call('HDEL', KEYS[1], 'entry')
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
"""

#: KEYS file, examples; ARGV record, op, retention in ms, examples...
PUT_FILE: Final = """
if redis.call('HGET', KEYS[1], 'op') == ARGV[2] then return 0 end
local count = redis.call('HLEN', KEYS[2])
for i = 4, #ARGV do redis.call('HSET', KEYS[2], count + i - 4, ARGV[i]) end
redis.call('HSET', KEYS[1], 'record', ARGV[1], 'op', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 1
"""

#: KEYS file, examples, feedback; ARGV example, retention in ms, TTL of the position in ms. The position from 1.
APPEND_FEEDBACK: Final = """
local known = redis.call('GET', KEYS[3])
if known then return tonumber(known) end
local position = redis.call('HLEN', KEYS[2]) + 1
redis.call('HSET', KEYS[2], position - 1, ARGV[1])
redis.call('SET', KEYS[3], position, 'PX', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return position
"""

#: KEYS jobs, job[, job request]; ARGV id, record, creation time, retention in ms (0: no end yet).
#: Nil: stored; else the id of the job that the request made before.
PUT_JOB: Final = """
local expiring = {KEYS[2]}
if KEYS[3] then
  local known = redis.call('GET', KEYS[3])
  if known and known ~= ARGV[1] then return known end
  redis.call('SET', KEYS[3], ARGV[1])
  expiring[2] = KEYS[3]
end
redis.call('SET', KEYS[2], ARGV[2])
redis.call('ZADD', KEYS[1], ARGV[3], ARGV[1])
if ARGV[4] ~= '0' then
  for _, key in ipairs(expiring) do redis.call('PEXPIRE', key, ARGV[4]) end
end
return false
"""
