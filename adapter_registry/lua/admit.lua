-- Charge a request to its tenant's quota, or refuse it and charge nothing; limits.py says the same in Python.
-- KEYS: settings, rates, active, usage of this month. ARGV: request id, tokens, lease in ms.
-- Answers {exceeded or '', ms until it may be asked again, settings or '', requests left or '', tokens left or ''}.
local stored = redis.call('GET', KEYS[1])
if not stored then return {'', 0, '', '', ''} end
local quota = cjson.decode(stored).quota
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function left(name, capacity)
  if not capacity then return nil end
  local kept = redis.call('HMGET', KEYS[2], name, name .. ':at')
  if not kept[1] then return capacity end
  return math.min(capacity, kept[1] + (now - kept[2]) * capacity / 60000)
end
local requests, tokens = left('requests', quota.requests_per_minute), left('tokens', quota.tokens_per_minute)

local function answer(exceeded, wait)
  return {
    exceeded, math.ceil(wait), stored,
    requests and string.format('%.3f', requests) or '', tokens and string.format('%.3f', tokens) or '',
  }
end

redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
if redis.call('ZSCORE', KEYS[3], ARGV[1]) then return answer('', 0) end
if quota.tokens_per_month and tonumber(redis.call('HGET', KEYS[4], 'total') or 0) >= quota.tokens_per_month then
  return answer('tokens_per_month', 0)
end
if quota.concurrent_requests and redis.call('ZCARD', KEYS[3]) >= quota.concurrent_requests then
  return answer('concurrent_requests', 0)
end
if requests and requests < 1 then
  return answer('requests_per_minute', (1 - requests) * 60000 / quota.requests_per_minute)
end
local need = tokens and math.min(tonumber(ARGV[2]), quota.tokens_per_minute)
if tokens and tokens < need then
  return answer('tokens_per_minute', (need - tokens) * 60000 / quota.tokens_per_minute)
end

local function keep(name, value)
  redis.call('HSET', KEYS[2], name, string.format('%.6f', value), name .. ':at', now)
end
if requests then
  requests = requests - 1
  keep('requests', requests)
end
if tokens then
  tokens = tokens - need
  keep('tokens', tokens)
end
redis.call('ZADD', KEYS[3], now + ARGV[3], ARGV[1])
redis.call('PEXPIRE', KEYS[3], 2 * ARGV[3])
return answer('', 0)
