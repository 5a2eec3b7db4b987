-- Keep a webhook, and begin at the end of the audit log. KEYS: webhooks, places, audit. ARGV: id, record, most of them.
-- Answers 1, or 0 when there are too many.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return 1 end
if redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[3]) then return 0 end
local last = redis.call('XREVRANGE', KEYS[3], '+', '-', 'COUNT', 1)
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('HSET', KEYS[2], ARGV[1], last[1] and last[1][1] or '0-0')
return 1
