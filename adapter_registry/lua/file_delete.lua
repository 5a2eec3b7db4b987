-- Remove a file that no job is using; content that nothing refers to becomes garbage.
-- KEYS: items, order, uses, refs, garbage, sizes. ARGV: id. Answers 'missing', 'in_use' or 'removed'.
local stored = redis.call('HGET', KEYS[1], ARGV[1])
if not stored then return 'missing' end
if redis.call('HEXISTS', KEYS[3], ARGV[1]) == 1 then return 'in_use' end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
local sha = cjson.decode(stored).sha256
if redis.call('HINCRBY', KEYS[4], sha, -1) <= 0 then
  local time = redis.call('TIME')
  redis.call('HDEL', KEYS[4], sha)
  local bytes = redis.call('HGET', KEYS[6], sha)
  if bytes then
    redis.call('HDEL', KEYS[6], sha)
    if redis.call('HINCRBY', KEYS[6], 'total', -bytes) <= 0 then redis.call('HDEL', KEYS[6], 'total') end
  end
  redis.call('ZADD', KEYS[5], time[1] * 1000 + math.floor(time[2] / 1000), sha)
end
return 'removed'
