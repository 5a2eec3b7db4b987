-- Move old garbage to `deleting` and answer it. KEYS: refs, garbage, deleting. ARGV: older_than_ms, lease_ms, limit.
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local answer = {}
-- A sweeper that died left its marks behind; once its lease is over they are handed out again.
for _, sha in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now_ms - ARGV[2], 'LIMIT', 0, ARGV[3])) do
  answer[#answer + 1] = sha
end
for _, sha in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now_ms - ARGV[1], 'LIMIT', 0, ARGV[3])) do
  redis.call('ZREM', KEYS[2], sha)
  if redis.call('HEXISTS', KEYS[1], sha) == 0 then answer[#answer + 1] = sha end
end
for _, sha in ipairs(answer) do redis.call('ZADD', KEYS[3], now_ms, sha) end
return answer
