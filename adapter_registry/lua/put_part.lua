-- Write a part of a key: the first one replaces what was there, and a part that is sent again is written once.
-- KEYS: key. ARGV: type, entries in earlier parts, words of an entry, then the entries. Of a stream, an entry is its id, how
-- many words follow, and these.
local key, type, before, width = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
if before == 0 then redis.call('DEL', key) end
if type == 'stream' then
  if redis.call('XLEN', key) > before then return 0 end
  local i = 4
  while i <= #ARGV do
    local words = {}
    for j = i + 2, i + 1 + ARGV[i + 1] do words[#words + 1] = ARGV[j] end
    redis.call('XADD', key, ARGV[i], unpack(words))
    i = i + 2 + ARGV[i + 1]
  end
  return 1
end
if type == 'list' and redis.call('LLEN', key) > before then return 0 end
local commands = {string = 'SET', hash = 'HSET', set = 'SADD', list = 'RPUSH'}
for i = 4, #ARGV, width do
  if type == 'zset' then
    redis.call('ZADD', key, ARGV[i + 1], ARGV[i])
  else
    redis.call(commands[type], key, unpack(ARGV, i, i + width - 1))
  end
end
return 1
