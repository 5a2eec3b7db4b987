-- Put the sizes of blobs right: note those that are in use and not known, forget those that are not in use, and sum up.
-- KEYS: refs, sizes. ARGV: sha256 and bytes of each that a version or file names.
for i = 1, #ARGV, 2 do
  if redis.call('HEXISTS', KEYS[1], ARGV[i]) == 1 then redis.call('HSETNX', KEYS[2], ARGV[i], ARGV[i + 1]) end
end
local total = 0
local kept = redis.call('HGETALL', KEYS[2])
for i = 1, #kept, 2 do
  if kept[i] ~= 'total' then
    if redis.call('HEXISTS', KEYS[1], kept[i]) == 1 then total = total + kept[i + 1] else redis.call('HDEL', KEYS[2], kept[i]) end
  end
end
if total > 0 then redis.call('HSET', KEYS[2], 'total', string.format('%d', total)) else redis.call('HDEL', KEYS[2], 'total') end
return 1
