-- With blobs.lua.
-- Make a file visible; its content becomes one more reference to a blob.
-- KEYS: items, order, refs, garbage, sizes, tenant's settings. ARGV: id, record, sha256, bytes.
-- Answers {'ok'}, {'unclaimed'} when the blob is neither claimed nor in use, or {'full', quota, bytes stored, bytes more}.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return {'ok'} end
if not is_held(KEYS[3], KEYS[4], ARGV[3]) then return {'unclaimed'} end
local full = over_quota(KEYS[6], KEYS[5], ARGV, 3)
if full then return full end
local last = redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], (tonumber(last[2]) or 0) + 1, ARGV[1])
hold(KEYS[3], KEYS[4], KEYS[5], ARGV[3], ARGV[4])
return {'ok'}
