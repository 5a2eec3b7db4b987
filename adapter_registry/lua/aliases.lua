-- How an alias moves, and says so in its adapter's log: put before every script that says so.
-- KEYS of such a script begin with: versions, aliases, where each alias was before, log, audit, splits, guards, outcomes.

local function is_ready(number)
  local stored = redis.call('HGET', KEYS[1], number)
  return stored and cjson.decode(stored).record.state == 'ready'
end

local function digest_of(number)
  local stored = number and redis.call('HGET', KEYS[1], number)
  return stored and cjson.decode(stored).digest
end

local function put(key, alias, json)
  if json ~= '' then redis.call('HSET', key, alias, json) else redis.call('HDEL', key, alias) end
end

-- `version` '' removes the alias; `split` and `guard` are JSON or ''. `by` says who, when and why, what the adapter is called,
-- and how many entries the log and the audit keep. Answers whether it could.
local function move_alias(alias, version, split, guard, by)
  local before, split_before = redis.call('HGET', KEYS[2], alias), redis.call('HGET', KEYS[6], alias)
  local guard_before = redis.call('HGET', KEYS[7], alias)
  local part = split ~= '' and cjson.decode(split) or nil
  if version == '' then
    if not before then return false end
    redis.call('HDEL', KEYS[2], alias)
  else
    if not is_ready(version) or (part and not is_ready(part.version)) then return false end
    redis.call('HSET', KEYS[2], alias, version)
  end
  put(KEYS[6], alias, split)
  put(KEYS[7], alias, guard)
  local moved = version ~= (before or '')
  if moved then put(KEYS[3], alias, before or '') end
  if not moved and split == (split_before or '') and guard == (guard_before or '') then return true end
  for _, field in ipairs(redis.call('HKEYS', KEYS[8])) do  -- what comes now is judged by itself
    if string.sub(field, 1, #alias + 1) == alias .. '|' then redis.call('HDEL', KEYS[8], field) end
  end
  redis.call('LPUSH', KEYS[4], cjson.encode({
    alias = alias, version = tonumber(version), before = tonumber(before or ''), by = by.who, at = by.at, split = part,
    guard = guard ~= '' and cjson.decode(guard) or nil, reason = by.reason,
  }))
  redis.call('LTRIM', KEYS[4], 0, by.moves_kept - 1)
  local detail = (before or 'none') .. ' to ' .. (version ~= '' and version or 'none')
  if part then
    detail = detail .. ', ' .. part.weight .. ' of it ' .. (part.shadow and 'shadowed by ' or 'to ') .. part.version
  end
  if by.reason then detail = detail .. ': ' .. by.reason end
  redis.call(
    'XADD', KEYS[5], 'MAXLEN', '~', by.audit_kept, '*', 'by', by.who, 'action', 'alias.moved', 'subject',
    by.name .. '@' .. alias, 'detail', detail
  )
  return true
end

-- Where an alias goes back to: its split goes first, then its last move. Nil if there is nowhere.
local function version_before(alias)
  if redis.call('HGET', KEYS[6], alias) then return redis.call('HGET', KEYS[2], alias) end
  return redis.call('HGET', KEYS[3], alias)
end
