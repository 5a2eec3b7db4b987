-- Everything under some keys of one slot, at one moment. KEYS: any. Answers {key, type, ms since the epoch when it ends or -1,
-- content} for each that is there; of a stream, which may be long and never changes behind its end, only {id of its last entry}.
local readers = {
  string = function(key) return {redis.call('GET', key)} end,
  hash = function(key) return redis.call('HGETALL', key) end,
  set = function(key) return redis.call('SMEMBERS', key) end,
  zset = function(key) return redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') end,
  list = function(key) return redis.call('LRANGE', key, 0, -1) end,
  stream = function(key)
    local last = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)
    return {last[1] and last[1][1] or '0-0'}
  end,
}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local answer = {}
for _, key in ipairs(KEYS) do
  local type = redis.call('TYPE', key).ok
  if type ~= 'none' then
    local left = redis.call('PTTL', key)
    answer[#answer + 1] = {key, type, left < 0 and '-1' or string.format('%d', now + left), readers[type](key)}
  end
end
return answer
