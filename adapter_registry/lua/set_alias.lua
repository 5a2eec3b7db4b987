-- Move an alias, and say so in its adapter's log.
-- KEYS: versions, aliases, where each alias was before, log, audit, splits.
-- ARGV: alias; version, 'back' to where it was before its last move, or '' to remove it; who; when; entries to keep;
-- the adapter's name; audit entries to keep; split as JSON, or ''.
-- Answers {1, version or 0}, or {0} when there is no such version, or nothing to go back to or remove.
local before, split_before = redis.call('HGET', KEYS[2], ARGV[1]), redis.call('HGET', KEYS[6], ARGV[1])
local version = ARGV[2]
if version == 'back' then
  local last  -- for aliases that were moved before there was KEYS[3]
  -- Asked again, because the answer was lost? Then it has gone back already, and must not go forth.
  for _, line in ipairs(redis.call('LRANGE', KEYS[4], 0, 20)) do
    local move = cjson.decode(line)
    if move.alias == ARGV[1] then
      if move.by == ARGV[3] and move.at == ARGV[4] then return {1, move.version} end
      if not last and move.before and move.before ~= move.version then last = string.format('%d', move.before) end
    end
  end
  version = split_before and before or redis.call('HGET', KEYS[3], ARGV[1]) or last
  if not version then return {0} end
end

local function is_ready(number)
  local stored = redis.call('HGET', KEYS[1], number)
  return stored and cjson.decode(stored).record.state == 'ready'
end
local split = ARGV[8] ~= '' and cjson.decode(ARGV[8]) or nil
if version == '' then
  if not before then return {0} end
  redis.call('HDEL', KEYS[2], ARGV[1])
else
  if not is_ready(version) or (split and not is_ready(split.version)) then return {0} end
  redis.call('HSET', KEYS[2], ARGV[1], version)
end
if split then redis.call('HSET', KEYS[6], ARGV[1], ARGV[8]) else redis.call('HDEL', KEYS[6], ARGV[1]) end

if version ~= (before or '') then
  if before then redis.call('HSET', KEYS[3], ARGV[1], before) else redis.call('HDEL', KEYS[3], ARGV[1]) end
end
if version ~= (before or '') or ARGV[8] ~= (split_before or '') then
  local move = {
    alias = ARGV[1], version = tonumber(version), before = tonumber(before or ''), by = ARGV[3], at = ARGV[4], split = split,
  }
  redis.call('LPUSH', KEYS[4], cjson.encode(move))
  redis.call('LTRIM', KEYS[4], 0, ARGV[5] - 1)
  local detail = (before or 'none') .. ' to ' .. (version ~= '' and version or 'none')
  if split then detail = detail .. ', ' .. split.weight .. ' of it to ' .. split.version end
  redis.call(
    'XADD', KEYS[5], 'MAXLEN', '~', ARGV[7], '*', 'by', ARGV[3], 'action', 'alias.moved',
    'subject', ARGV[6] .. '@' .. ARGV[1], 'detail', detail
  )
end
return {1, tonumber(version) or 0}
