-- Make a file visible; its content becomes one more reference to a blob. KEYS: items, order, refs, garbage.
-- ARGV: id, record, sha256. Answers 1, or 0 when the blob is neither claimed nor in use.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return 1 end
if redis.call('HEXISTS', KEYS[3], ARGV[3]) == 0 and not redis.call('ZSCORE', KEYS[4], ARGV[3]) then return 0 end
local last = redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], (tonumber(last[2]) or 0) + 1, ARGV[1])
redis.call('HINCRBY', KEYS[3], ARGV[3], 1)
redis.call('ZREM', KEYS[4], ARGV[3])
return 1
