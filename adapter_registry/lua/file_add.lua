-- Make a file visible; its content becomes one more reference to a blob.
-- KEYS: items, order, refs, garbage, sizes, tenant's settings. ARGV: id, record, sha256, bytes.
-- Answers {'ok'}, {'unclaimed'} when the blob is neither claimed nor in use, or {'full', quota, bytes stored, bytes more}.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return {'ok'} end
if redis.call('HEXISTS', KEYS[3], ARGV[3]) == 0 and not redis.call('ZSCORE', KEYS[4], ARGV[3]) then return {'unclaimed'} end
local settings = redis.call('GET', KEYS[6])
local quota = settings and cjson.decode(settings).quota
local limit = quota and quota.storage_bytes
local stored = tonumber(redis.call('HGET', KEYS[5], 'total') or 0)
local more = redis.call('HEXISTS', KEYS[5], ARGV[3]) == 0 and tonumber(ARGV[4]) or 0
if type(limit) == 'number' and stored + more > limit then
  return {'full', string.format('%d', limit), string.format('%d', stored), string.format('%d', more)}
end
local last = redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], (tonumber(last[2]) or 0) + 1, ARGV[1])
redis.call('HINCRBY', KEYS[3], ARGV[3], 1)
if redis.call('HSETNX', KEYS[5], ARGV[3], ARGV[4]) == 1 then redis.call('HINCRBY', KEYS[5], 'total', ARGV[4]) end
redis.call('ZREM', KEYS[4], ARGV[3])
return {'ok'}
