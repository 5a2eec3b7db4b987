-- Count what a request used, once, and correct what it was charged.
-- KEYS: settings, rates, active, settled, usage of its month.
-- ARGV: request id, ids to keep, seconds to keep usage, tokens charged, tokens used, then counter and amount ...
-- Answers 1, or 0 when this request was settled before.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if redis.call('ZADD', KEYS[4], 'NX', now, ARGV[1]) == 0 then return 0 end
redis.call('ZREMRANGEBYRANK', KEYS[4], 0, -1 - ARGV[2])
redis.call('ZREM', KEYS[3], ARGV[1])
for i = 6, #ARGV, 2 do
  if ARGV[i + 1] ~= '0' then redis.call('HINCRBY', KEYS[5], ARGV[i], ARGV[i + 1]) end
end
redis.call('HINCRBY', KEYS[5], 'total', ARGV[5])
redis.call('EXPIRE', KEYS[5], ARGV[3])

local stored = redis.call('GET', KEYS[1])
local capacity = stored and cjson.decode(stored).quota.tokens_per_minute
local kept = redis.call('HMGET', KEYS[2], 'tokens', 'tokens:at')
if capacity then
  local tokens = kept[1] and math.min(capacity, kept[1] + (now - kept[2]) * capacity / 60000) or capacity
  tokens = math.min(capacity, tokens + math.min(ARGV[4], capacity) - ARGV[5])
  redis.call('HSET', KEYS[2], 'tokens', string.format('%.6f', tokens), 'tokens:at', now)
end
return 1
