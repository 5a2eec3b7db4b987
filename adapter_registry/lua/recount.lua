-- Note the size of blobs that are in use and whose size is not known. KEYS: refs, sizes. ARGV: sha256 and bytes of each.
for i = 1, #ARGV, 2 do
  if redis.call('HEXISTS', KEYS[1], ARGV[i]) == 1 and redis.call('HSETNX', KEYS[2], ARGV[i], ARGV[i + 1]) == 1 then
    redis.call('HINCRBY', KEYS[2], 'total', ARGV[i + 1])
  end
end
return 1
