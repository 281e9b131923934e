"""The scripts of lanes, in the Lua of Redis and Valkey. `lane_store` calls them.

Strategy: a lane is a list of entries, and one drain at a time may remove entries from it: the one
whose token is in the state. Each change of that state is one script, so there is no moment at which
a lane has entries and will be looked at by no process. Every script may be sent twice, because
Redis clients repeat a call whose reply was lost.

The keys of a handler, where `H` is `_flash.ordered.<source>.<handler>`:

- `H.due`, a sorted set: for each lane that has entries, when a process has to look at it.
- `H.state`, a hash. Of the handler: `layout`, `former` (the layout before, whose lanes were empty),
  `lanes`, `queue` and `wake` (the list that Celery workers pop from, and the message to push
  there), `form` (for drains), `paused`, `waiting` (how many changes wait), `fence` (of the last
  claim), and the counters `wakes`, `barriers`. Of each lane, by a letter:
    - `t` the token of the drain that holds it or whose lease has run out; `died` if its process has
    - `m` its lease runs (until the time in `due`)
    - `s` it sleeps: a retry (until the time in `due`)
    - `b` it is not in `due`: `1` waits at a barrier, `x` is blocked by a change that failed
    - `x` which change blocks it, in JSON
    - `c` how many changes of the first entry are done
    - `k` the number of the token's last commit
    - `r` how often the first change was retried
    - `d` how many processes have died on it
    - `w` how many wakes the sweep has sent since the last claim
    - `n` how many changes wait in it
- `H.<lane>`, a list: the entries, oldest first. `!<id>:<lanes>` is the marker of a barrier.
- `H.dead.<lane>`, a hash: changes of the lane that became dead letters. See `lane_letters`.
- `H.barriers`, a hash: the entry of each barrier that is not open yet, by id.
- `H.barrier.<id>`, a set: the lanes that have arrived at a barrier.

A lane is one of: absent (no entries), woken (`due`: when to wake it again), leased (`m`), asleep
(`s`), parked at a barrier or blocked (`b`, not in `due`).

Time is that of the server, unless a test passes its own as the first argument.
"""

from __future__ import annotations

#: Seconds after a wake in which a drain should have claimed its lane; then it is woken again. With
#: a shorter lease it is the length of that.
GRACE = 30.0
#: The places in the text of a wake for the lane's number and for the wake's id.
LANE_MARK = "@LANE@"
ID_MARK = "@ID@"
#: A step is refused because its lanes have another layout, or none.
OTHER_LAYOUT = 2

#: Functions that several scripts share. `H` is the name of the handler's keys.
_FUNCTIONS = """
local OF_LANE = {'t', 'm', 's', 'b', 'x', 'c', 'k', 'r', 'd', 'w', 'n'}

local function time_now(given)
    local now = tonumber(given)
    if now then return now end
    local time = redis.call('TIME')
    return time[1] + time[2] / 1000000
end

-- Forget fields of a lane: a string of letters.
local function clear(H, lane, letters)
    local fields = {}
    for letter in string.gmatch(letters, '.') do fields[#fields + 1] = letter .. lane end
    redis.call('HDEL', H .. '.state', unpack(fields))
end

local function forget(H, lane)
    redis.call('ZREM', H .. '.due', lane)
    -- None are left, unless the list was deleted or evicted. A count that stayed would hold up
    -- another layout for ever.
    local lost = tonumber(redis.call('HGET', H .. '.state', 'n' .. lane) or 0)
    if lost ~= 0 then redis.call('HINCRBY', H .. '.state', 'waiting', -lost) end
    clear(H, lane, table.concat(OF_LANE))
end

-- Forget what is noted of dead letters, because later changes may come in other lanes.
local function forget_letters(H)
    local lanes = tonumber(redis.call('HGET', H .. '.state', 'lanes') or 0)
    for lane = 0, lanes - 1 do redis.call('DEL', H .. '.dead.' .. lane) end
end

-- Push the message that makes a worker look at the lane. Each has an id of its own, because an
-- acknowledgement goes by it.
local function wake(H, lane, now)
    local S = H .. '.state'
    local made = redis.call('HMGET', S, 'queue', 'wake')
    local id = redis.call('HINCRBY', S, 'wakes', 1) .. string.format('.%.6f', now)
    local text = string.gsub(made[2], '@LANE@', lane)
    text = string.gsub(text, '@ID@', id)
    redis.call('LPUSH', made[1], text)
end

local function wake_later(H, lane, now, seconds)
    redis.call('ZADD', H .. '.due', string.format('%.6f', now + seconds), lane)
end

-- The seconds after which a lane is woken again. A replication worker of before has not set them.
local function grace(H)
    return tonumber(redis.call('HGET', H .. '.state', 'grace') or 30)
end

-- Give a lane to the next worker.
local function hand_on(H, lane, now)
    wake_later(H, lane, now, grace(H))
    wake(H, lane, now)
end

local function holds(H, lane, token)
    return redis.call('HGET', H .. '.state', 't' .. lane) == token
end

-- Push entries: the words from `first` to `last` are, repeatedly, a lane, a number of changes and
-- an entry. The commands for an entry are most of what it costs: so there are as few as possible.
local function push(H, now, first, last)
    local S, D, total = H .. '.state', H .. '.due', 0
    for at = first, last, 3 do total = total + ARGV[at + 1] end
    redis.call('HINCRBY', S, 'waiting', string.format('%.0f', total))
    for at = first, last, 3 do
        local lane = ARGV[at]
        redis.call('RPUSH', H .. '.' .. lane, ARGV[at + 2])
        redis.call('HINCRBY', S, 'n' .. lane, ARGV[at + 1])
        -- A lane that is in `due` is neither parked nor blocked.
        if not redis.call('ZSCORE', D, lane) and redis.call('HEXISTS', S, 'b' .. lane) == 0 then
            hand_on(H, lane, now)
        end
    end
end

-- A marker goes into each lane; a lane without entries has arrived already.
local function barrier(H, now, entry, lanes)
    local S = H .. '.state'
    local id = redis.call('HINCRBY', S, 'barriers', 1)
    local arrived, last = H .. '.barrier.' .. id, nil
    redis.call('HSET', H .. '.barriers', id, entry)
    redis.call('HINCRBY', S, 'waiting', 1)
    for _, lane in ipairs(lanes) do
        redis.call('RPUSH', H .. '.' .. lane, '!' .. id .. ':' .. #lanes)
        if redis.call('HEXISTS', S, 'b' .. lane) == 0
            and not redis.call('ZSCORE', H .. '.due', lane) then
            redis.call('SADD', arrived, lane)
            redis.call('HSET', S, 'b' .. lane, '1')
            last = lane
        end
    end
    if redis.call('SCARD', arrived) == #lanes then
        clear(H, last, 'b')
        hand_on(H, last, now)
    end
end

-- Remove the markers of a barrier, and let its lanes go on.
local function open(H, now, id)
    local arrived = H .. '.barrier.' .. id
    local lanes, marker = redis.call('SMEMBERS', arrived), '!' .. id .. ':'
    for _, lane in ipairs(lanes) do
        local first = redis.call('LINDEX', H .. '.' .. lane, 0) or ''
        if string.sub(first, 1, #marker) ~= marker then
            error('lane ' .. lane .. ' is not at the barrier ' .. id)
        end
    end
    for _, lane in ipairs(lanes) do
        redis.call('LPOP', H .. '.' .. lane)
        clear(H, lane, 'tmsbxckrdw')
        if redis.call('EXISTS', H .. '.' .. lane) == 1 then
            hand_on(H, lane, now)
        else
            forget(H, lane)
        end
    end
    redis.call('DEL', arrived)
    redis.call('HDEL', H .. '.barriers', id)
    redis.call('HINCRBY', H .. '.state', 'waiting', -1)
end

-- Add the entries of a lane from a position on, up to a number of entries and of bytes.
local function read(H, lane, from, most, bytes, into)
    local size = 0
    for position = from, from + most - 1 do
        local entry = redis.call('LINDEX', H .. '.' .. lane, position)
        if not entry then break end
        size = size + #entry
        if size > bytes and position > from then break end
        into[#into + 1] = entry
    end
    return into
end

-- Remove `removed` entries and note that `cursor` changes of the first one are done; return whether
-- more wait. `done` changes leave the lane.
local function remove(H, lane, removed, cursor, done)
    local S = H .. '.state'
    if removed > 0 then redis.call('LTRIM', H .. '.' .. lane, removed, -1) end
    if cursor > 0 then
        redis.call('HSET', S, 'c' .. lane, cursor)
    else
        redis.call('HDEL', S, 'c' .. lane)
    end
    if done > 0 then
        clear(H, lane, 'rd')
        redis.call('HINCRBY', S, 'n' .. lane, -done)
        redis.call('HINCRBY', S, 'waiting', -done)
    end
end
"""

_BEGIN = (
    _FUNCTIONS
    + """
local H, S, D = KEYS[1], KEYS[1] .. '.state', KEYS[1] .. '.due'
-- A script that has begun to write may go on when Redis is full. This removes nothing, and so needs
-- no memory; without it, no drain could make room.
redis.call('HDEL', S, '')
local now = time_now(ARGV[1])
"""
)

#: Sets up the keys of a handler before anything is pushed. KEYS: H, the registry. ARGV: time, H
#: without prefix, layout, lanes, queue, wake, form, paused ('1', '0', or '' to leave it), grace (or
#: '' to leave it). A new layout is taken only when nothing waits, because it may place a key into
#: another lane. Returns 1, or 0 if it must wait.
CONFIGURE = (
    _BEGIN
    + """
-- First, so that lanes that have to be emptied can go on.
if ARGV[8] == '1' then
    redis.call('HSET', S, 'paused', '1')
elseif ARGV[8] == '0' and redis.call('HDEL', S, 'paused') == 1 then
    -- Its wakes found it paused, so the next sweep wakes the lanes again.
    for _, lane in ipairs(redis.call('ZRANGE', D, 0, -1)) do
        local found = redis.call('HMGET', S, 's' .. lane, 'm' .. lane)
        if not found[1] and not found[2] then wake_later(H, lane, now, 0) end
    end
end
if ARGV[9] ~= '' then redis.call('HSET', S, 'grace', ARGV[9]) end
local layout = redis.call('HGET', S, 'layout')
if layout and layout ~= ARGV[3] and tonumber(redis.call('HGET', S, 'waiting') or 0) > 0 then
    return 0
end
if layout and layout ~= ARGV[3] then
    redis.call('HSET', S, 'former', layout)
    forget_letters(H)
end
redis.call('SADD', KEYS[2], ARGV[2])
redis.call('HSET', S, 'layout', ARGV[3], 'lanes', ARGV[4], 'queue', ARGV[5], 'wake', ARGV[6],
    'form', ARGV[7])
return 1
"""
)

#: Takes a lease. ARGV: time, lane, token, seconds of the lease, most entries, most bytes. Returns
#: 'nothing', 'paused', 'asleep', 'held', or 'ok', fence, cursor, retries, deaths, number of
#: noted dead letters, form, entries.
CLAIM = (
    _BEGIN
    + """
local lane, token = ARGV[2], ARGV[3]
local due = redis.call('ZSCORE', D, lane)
if not due then return {'nothing'} end
if redis.call('HEXISTS', S, 'paused') == 1 then return {'paused'} end
local found = redis.call('HMGET', S, 't' .. lane, 's' .. lane, 'm' .. lane, 'c' .. lane,
    'r' .. lane, 'form', 'fence')
local mine, fence = found[1] == token, tonumber(found[7] or 0)
if tonumber(due) > now and not mine then
    if found[2] then return {'asleep'} end
    if found[3] then return {'held'} end
end
local entries = read(H, lane, 0, tonumber(ARGV[5]), tonumber(ARGV[6]), {})
if #entries == 0 then
    forget(H, lane)
    return {'nothing'}
end
if not mine then
    -- The token is still there if its process died, or lost its lease.
    if found[1] then redis.call('HINCRBY', S, 'd' .. lane, 1) end
    -- It has to grow even if Redis has lost the last one, because handlers store it.
    fence = math.max(fence + 1, math.floor(now * 1000000))
    redis.call('HSET', S, 'fence', string.format('%.0f', fence))
    clear(H, lane, 'swk')
end
redis.call('HSET', S, 't' .. lane, token, 'm' .. lane, '1')
wake_later(H, lane, now, ARGV[4])
local deaths = tonumber(redis.call('HGET', S, 'd' .. lane) or 0)
local letters = redis.call('HLEN', H .. '.dead.' .. lane)
return {'ok', fence, tonumber(found[4] or 0), tonumber(found[5] or 0), deaths, letters,
    found[6] or '', unpack(entries)}
"""
)

#: Notes what is done. ARGV: time, lane, token, seconds of the lease, number of the commit, entries
#: removed, cursor, changes done, entries that the caller still has, most entries, most bytes, and
#: 'leave' or ''. Returns 'lost', 'empty', 'left', or 'ok' and the entries after those that the
#: caller has. The number makes a repetition remove nothing, even one that a cut connection delivers
#: after later commits.
COMMIT = (
    _BEGIN
    + """
local lane = ARGV[2]
if not holds(H, lane, ARGV[3]) then return {'lost'} end
if tonumber(redis.call('HGET', S, 'k' .. lane) or 0) < tonumber(ARGV[5]) then
    redis.call('HSET', S, 'k' .. lane, ARGV[5])
    remove(H, lane, tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]))
end
if redis.call('EXISTS', H .. '.' .. lane) == 0 then
    forget(H, lane)
    return {'empty'}
end
if ARGV[12] == 'leave' then
    clear(H, lane, 'tmk')
    hand_on(H, lane, now)
    return {'left'}
end
redis.call('HSET', S, 'm' .. lane, '1')
wake_later(H, lane, now, ARGV[4])
return read(H, lane, tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11]), {'ok'})
"""
)

#: Notes what is done, like COMMIT, for a drain that has more entries. ARGV: time, lane, token,
#: seconds of the lease (or '' not to extend it), number of the commit, entries removed, cursor,
#: changes done. Returns 'ok' or 'lost'. It runs for every few changes, and its commands are most of
#: what it costs: so there are as few as possible.
ADVANCE = """
local S, lane = KEYS[1] .. '.state', ARGV[2]
local found = redis.call('HMGET', S, 't' .. lane, 'k' .. lane, 'n' .. lane, 'waiting',
    'r' .. lane, 'd' .. lane)
if found[1] ~= ARGV[3] then return redis.status_reply('lost') end
local again = tonumber(found[2] or 0) >= tonumber(ARGV[5])
-- Before all else, because LTRIM needs no memory; see `HDEL` in the other scripts.
redis.call('LTRIM', KEYS[1] .. '.' .. lane, again and '0' or ARGV[6], -1)
if not again then
    local left = string.format('%.0f', (found[3] or 0) - ARGV[8])
    local waiting = string.format('%.0f', (found[4] or 0) - ARGV[8])
    redis.call('HSET', S, 'k' .. lane, ARGV[5], 'c' .. lane, ARGV[7], 'n' .. lane, left,
        'waiting', waiting)
    if found[5] or found[6] then redis.call('HDEL', S, 'r' .. lane, 'd' .. lane) end
end
if ARGV[4] ~= '' then
    local now = tonumber(ARGV[1])
    if not now then
        local time = redis.call('TIME')
        now = time[1] + time[2] / 1000000
    end
    redis.call('HSET', S, 'm' .. lane, '1')
    redis.call('ZADD', KEYS[1] .. '.due', string.format('%.6f', now + ARGV[4]), lane)
end
return redis.status_reply('ok')
"""

#: Extends a lease, also one that has run out while no other drain claimed the lane. ARGV: time,
#: lane, token, seconds. Returns 1, or 0 if the lease is another's.
RENEW = (
    _BEGIN
    + """
local lane = ARGV[2]
if not holds(H, lane, ARGV[3]) then return 0 end
redis.call('HSET', S, 'm' .. lane, '1')
wake_later(H, lane, now, ARGV[4])
return 1
"""
)

#: Ends a lease until the first change may be retried. ARGV: time, lane, token, seconds, retries.
#: Returns 1, or 0 if the lease is another's.
SLEEP = (
    _BEGIN
    + """
local lane = ARGV[2]
if not holds(H, lane, ARGV[3]) then return 0 end
clear(H, lane, 'tmdk')
redis.call('HSET', S, 's' .. lane, '1', 'r' .. lane, ARGV[5])
wake_later(H, lane, now, ARGV[4])
return 1
"""
)

#: Ends a lease without anything done. ARGV: time, lane, the beginning of the token, 'died' or ''.
#: After 'died' the next claim counts a death, and what the dead process sent has no effect, however
#: late it arrives. Returns 1, or 0 if the lease is another's.
RELEASE = (
    _BEGIN
    + """
local lane, token = ARGV[2], redis.call('HGET', S, 't' .. ARGV[2])
if not token or string.sub(token, 1, #ARGV[3]) ~= ARGV[3] then return 0 end
if redis.call('HEXISTS', S, 'm' .. lane) == 0 then return 0 end
if ARGV[4] == 'died' then
    clear(H, lane, 'mk')
    redis.call('HSET', S, 't' .. lane, 'died')
else
    clear(H, lane, 'tmk')
end
hand_on(H, lane, now)
return 1
"""
)

#: Ends a lease until an operator decides about the first change. ARGV: time, lane, token, reason.
#: Returns 1, or 0 if the lease is another's.
BLOCK = (
    _BEGIN
    + """
local lane = ARGV[2]
if not holds(H, lane, ARGV[3]) then return 0 end
clear(H, lane, 'tmsdk')
redis.call('ZREM', D, lane)
redis.call('HSET', S, 'b' .. lane, 'x', 'x' .. lane, ARGV[4])
return 1
"""
)

#: Lets a blocked lane go on. ARGV: time, lane, its reason as it was read, entries removed, cursor,
#: changes done, the id of the barrier to open or ''. Returns 1, or 0 if the lane is not blocked so.
UNBLOCK = (
    _BEGIN
    + """
local lane = ARGV[2]
if redis.call('HGET', S, 'x' .. lane) ~= ARGV[3] then return 0 end
clear(H, lane, 'bxr')
if ARGV[7] ~= '' then
    open(H, now, ARGV[7])
    return 1
end
remove(H, lane, tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]))
if redis.call('EXISTS', H .. '.' .. lane) == 0 then forget(H, lane) else hand_on(H, lane, now) end
return 1
"""
)

#: Removes the first entry of a lane, or opens the barrier it is a marker of, because no worker can
#: read it. ARGV: time, lane, the text of the entry or the barrier, how many changes it counts for,
#: the id of the barrier or ''. Returns 1, or 0 if a drain has the lane, another entry is first, or
#: lanes have not arrived at the barrier.
DISCARD = (
    _BEGIN
    + """
local lane, due = ARGV[2], redis.call('ZSCORE', D, ARGV[2])
if redis.call('HEXISTS', S, 'm' .. lane) == 1 and due and tonumber(due) > now then return 0 end
local first = redis.call('LINDEX', H .. '.' .. lane, 0) or ''
if ARGV[5] ~= '' then
    local marker = '!' .. ARGV[5] .. ':' .. redis.call('SCARD', H .. '.barrier.' .. ARGV[5])
    if first ~= marker then return 0 end
    if redis.call('HGET', H .. '.barriers', ARGV[5]) ~= ARGV[3] then return 0 end
    open(H, now, ARGV[5])
    return 1
end
if first ~= ARGV[3] then return 0 end
clear(H, lane, 'tmsbxkw')
remove(H, lane, 1, 0, tonumber(ARGV[4]))
if redis.call('EXISTS', H .. '.' .. lane) == 0 then forget(H, lane) else hand_on(H, lane, now) end
return 1
"""
)

#: Removes the keys of a handler whose slot is gone, unless changes wait. KEYS: H, the registry.
#: ARGV: time, H without prefix. Returns how many changes wait.
REMOVE = (
    _BEGIN
    + """
local waiting = tonumber(redis.call('HGET', S, 'waiting') or 0)
if waiting > 0 then return waiting end
forget_letters(H)
redis.call('DEL', S, D)
redis.call('SREM', KEYS[2], ARGV[2])
return 0
"""
)

#: Wakes each lane whose time has come: a wake was lost, a lease has run out, a retry is due. ARGV:
#: time, most lanes. Returns how many. The time between two wakes grows while no worker comes.
SWEEP = (
    _BEGIN
    + """
if redis.call('HEXISTS', S, 'paused') == 1 then return 0 end
local lanes = redis.call('ZRANGEBYSCORE', D, '-inf', string.format('%.6f', now),
    'LIMIT', 0, ARGV[2])
for _, lane in ipairs(lanes) do
    local count = redis.call('HINCRBY', S, 'w' .. lane, 1)
    clear(H, lane, 'sm')
    wake_later(H, lane, now, grace(H) * math.min(2 ^ (count - 1), 16))
    wake(H, lane, now)
end
return #lanes
"""
)

#: Arrives with a lane at the barrier whose marker is its first entry. ARGV: time, lane, token, id,
#: number of lanes. Returns 'lost', 'parked', or 'run' and the entry of the barrier: all are there.
ARRIVE = (
    _BEGIN
    + """
local lane, arrived = ARGV[2], H .. '.barrier.' .. ARGV[4]
if not holds(H, lane, ARGV[3]) then return {'lost'} end
redis.call('SADD', arrived, lane)
if redis.call('SCARD', arrived) == tonumber(ARGV[5]) then
    return {'run', redis.call('HGET', H .. '.barriers', ARGV[4]) or ''}
end
redis.call('ZREM', D, lane)
clear(H, lane, 'tmsdkcrw')
redis.call('HSET', S, 'b' .. lane, '1')
return {'parked'}
"""
)

#: Opens a barrier, whose change is done. ARGV: time, lane, token, id. Returns 1, or 0 if the lease
#: is another's.
OPEN = (
    _BEGIN
    + """
if not holds(H, ARGV[2], ARGV[3]) then return 0 end
open(H, now, ARGV[4])
return 1
"""
)

#: Notes that dead letters are superseded. KEYS: the hash. ARGV: seconds to keep it, the changes.
SUPERSEDE = """
for position = 2, #ARGV do
    local noted = redis.call('HGET', KEYS[1], ARGV[position])
    if noted then redis.call('HSET', KEYS[1], ARGV[position], '1' .. string.sub(noted, 2)) end
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
"""

#: For scripts that push among other commands: `check` returns whether a command can be executed,
#: `run` executes one of Redis or of lanes. The words of the latter are 'FLASH.PUSH', H, layout and,
#: repeatedly, a lane, a number of changes and an entry; or 'FLASH.BARRIER', H, layout, an entry,
#: and the lanes.
COMMANDS = (
    _FUNCTIONS
    + """
local function check(at, last)
    local name, H = ARGV[at], ARGV[at + 1]
    if name == 'LPUSH' or name == 'RPUSH' or name == 'LTRIM' then redis.call('LLEN', H) end
    if name ~= 'FLASH.PUSH' and name ~= 'FLASH.BARRIER' then return true end
    local found = redis.call('HMGET', H .. '.state', 'layout', 'queue')
    if found[1] ~= ARGV[at + 2] then return false end
    redis.call('LLEN', found[2])
    redis.call('ZCARD', H .. '.due')
    local first, width = at + 3, 3
    if name == 'FLASH.BARRIER' then
        redis.call('HLEN', H .. '.barriers')
        first, width = at + 4, 1
    end
    for position = first, last, width do redis.call('LLEN', H .. '.' .. ARGV[position]) end
    return true
end

local function run(at, last)
    local name, H = ARGV[at], ARGV[at + 1]
    if name == 'FLASH.PUSH' then
        push(H, time_now(''), at + 3, last)
    elseif name == 'FLASH.BARRIER' then
        local lanes = {}
        for position = at + 4, last do lanes[#lanes + 1] = ARGV[position] end
        barrier(H, time_now(''), ARGV[at + 3], lanes)
    else
        redis.call(unpack(ARGV, at, last))
    end
end
"""
)
