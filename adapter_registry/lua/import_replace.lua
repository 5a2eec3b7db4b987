-- With blobs.lua.
-- Compare and set: replace an import's record if it still is what was read; one that ends lets go of its parts.
-- KEYS: items, open, parts, refs, garbage, sizes. ARGV: id, value as read, new value (each write's own), '1' if it has ended.
-- Answers 1, or 0: read it again.
local stored = redis.call('HGET', KEYS[1], ARGV[1])
if stored == ARGV[3] then return 1 end -- the answer to an earlier try was lost
if stored ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
if ARGV[4] == '1' then
  redis.call('SREM', KEYS[2], ARGV[1])
  for _, sha in ipairs(redis.call('HVALS', KEYS[3])) do release(KEYS[4], KEYS[5], KEYS[6], sha) end
  redis.call('DEL', KEYS[3])
end
return 1
