-- With blobs.lua.
-- Remove a file that no job is using; content that nothing refers to becomes garbage.
-- KEYS: items, order, uses, refs, garbage, sizes. ARGV: id. Answers 'missing', 'in_use' or 'removed'.
local stored = redis.call('HGET', KEYS[1], ARGV[1])
if not stored then return 'missing' end
if redis.call('HEXISTS', KEYS[3], ARGV[1]) == 1 then return 'in_use' end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
release(KEYS[4], KEYS[5], KEYS[6], cjson.decode(stored).sha256)
return 'removed'
