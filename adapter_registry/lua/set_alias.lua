-- Move an alias, and say so in its adapter's log. KEYS: versions, aliases, log, audit.
-- ARGV: alias; version, 'back' to where it was before its last move, or '' to remove it; who; when; entries to keep;
-- the adapter's name; audit entries to keep.
-- Answers {1, version or 0}, or {0} when there is no such version, or nothing to go back to or remove.
local before = redis.call('HGET', KEYS[2], ARGV[1])
local version = ARGV[2]
if version == 'back' then
  version = nil
  for _, line in ipairs(redis.call('LRANGE', KEYS[3], 0, -1)) do
    local move = cjson.decode(line)
    if move.alias == ARGV[1] then
      version = move.before and string.format('%d', move.before)
      break
    end
  end
  if not version then return {0} end
end
if version == '' then
  if not before then return {0} end
  redis.call('HDEL', KEYS[2], ARGV[1])
else
  local stored = redis.call('HGET', KEYS[1], version)
  if not stored or cjson.decode(stored).record.state ~= 'ready' then return {0} end
  redis.call('HSET', KEYS[2], ARGV[1], version)
end
if version ~= (before or '') then
  local move = {alias = ARGV[1], version = tonumber(version), before = tonumber(before or ''), by = ARGV[3], at = ARGV[4]}
  redis.call('LPUSH', KEYS[3], cjson.encode(move))
  redis.call('LTRIM', KEYS[3], 0, ARGV[5] - 1)
  redis.call(
    'XADD', KEYS[4], 'MAXLEN', '~', ARGV[7], '*', 'by', ARGV[3], 'action', 'alias.moved',
    'subject', ARGV[6] .. '@' .. ARGV[1], 'detail', (before or 'none') .. ' to ' .. (version ~= '' and version or 'none')
  )
end
return {1, tonumber(version) or 0}
