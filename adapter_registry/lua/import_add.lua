-- Keep a new import. KEYS: items, order, open. ARGV: id, record, most open ones, most that are kept.
-- Answers 1, or 0 when too many are open. Ended ones make room for it, the oldest first.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return 1 end
if redis.call('SCARD', KEYS[3]) >= tonumber(ARGV[3]) then return 0 end
local last = redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], (tonumber(last[2]) or 0) + 1, ARGV[1])
redis.call('SADD', KEYS[3], ARGV[1])
local over = redis.call('ZCARD', KEYS[2]) - ARGV[4]
for _, id in ipairs(over > 0 and redis.call('ZRANGE', KEYS[2], 0, ARGV[3]) or {}) do
  if over > 0 and redis.call('SISMEMBER', KEYS[3], id) == 0 then
    redis.call('HDEL', KEYS[1], id)
    redis.call('ZREM', KEYS[2], id)
    over = over - 1
  end
end
return 1
